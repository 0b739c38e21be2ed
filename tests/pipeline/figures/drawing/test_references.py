"""Reference lines: scores that the tasks state, with their words in the legend."""

import itertools

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from cat.tasks.copying import Copying
from cat.tasks.recall import Recall
from cat.tasks.text import Text
from pipeline.config.grid import seeds_of, shown_cells
from pipeline.config.load import study_of
from pipeline.config.plots import load_plot
from pipeline.figures.drawing.references import DASHES, GREYS, _style, reference_words
from pipeline.storage.tables import REFERENCE_COLUMNS
from tests.helpers.figures import draw
from tests.pipeline.config.test_study import MISSING, edited, errors_of

WORDS = {"guess_value": "guess a value of the context", "last_key_token": "look up the last token of the key"}
NAMES = list(WORDS)


@pytest.fixture(autouse=True)
def _tasks_state_references(monkeypatch):
    monkeypatch.setattr(Recall, "reference_names", tuple(WORDS))
    monkeypatch.setattr(Recall, "reference_labels", WORDS)
    for other in (Copying, Text):
        monkeypatch.setattr(other, "reference_names", ())
        monkeypatch.setattr(other, "reference_labels", {})
    yield
    plt.close("all")


def study_with_lines(name, **changes):
    """The smoke preset with reference lines in ablation `name`."""
    edits = {f"ablations.{name}.{key}": value for key, value in changes.items()}
    return study_of(edited({f"ablations.{name}.reference_lines": NAMES, **edits}), "params.yaml")


def results_of(study, ablation):
    """Any scores of the cells of a figure."""
    rows = [
        (task, variant, seed, multiple, "bits_per_byte" if task == "text" else "accuracy", 0.7)
        for task, variant in shown_cells(study, ablation)
        for seed, multiple in itertools.product(seeds_of(study, task, variant), study.tasks[task].data.multiples)
    ]
    return pd.DataFrame(rows, columns=["task", "variant", "seed", "multiple", "metric", "value"])


def references_of(study, value):
    """A table as from `read_references`; `value` gives the score of a task, a reference and a multiple."""
    rows = [
        (task, name, round(section.data.length * multiple), multiple, "accuracy", value(task, name, multiple))
        for task, section in study.tasks.items()
        for name in section.data.reference_names
        for multiple in section.data.multiples
    ]
    return pd.DataFrame(rows, columns=[*REFERENCE_COLUMNS])


def score(task, name, multiple):
    return (0.25 if name == "guess_value" else 0.5) / multiple


def legend(figure):
    return [text.get_text() for text in figure.legends[0].texts]


def lines_of(axes):
    return {line.get_label(): line for line in axes.lines if line.get_label().startswith(tuple(WORDS.values()))}


def test_a_curve_by_length_per_reference():
    study = study_with_lines("hybrid")
    ablation = study.ablations["hybrid"]
    figure = draw("lines", study, ablation, results_of(study, ablation), references_of(study, score))
    lines = lines_of(figure.axes[0])
    assert list(lines) == list(WORDS.values())
    np.testing.assert_allclose(lines[WORDS["last_key_token"]].get_xydata(), [[0.5, 1.0], [1, 0.5], [2, 0.25]])
    assert legend(figure)[-2:] == list(WORDS.values()), "after the variants"


def test_the_same_score_at_every_length_is_one_level():
    study = study_with_lines("width")
    ablation = study.ablations["width"]
    figure = draw("sweep", study, ablation, results_of(study, ablation), references_of(study, lambda *of: 0.3))
    lines = lines_of(figure.axes[0])
    assert [set(line.get_ydata()) for line in lines.values()] == [{0.3}, {0.3}]
    assert legend(figure)[-2:] == list(WORDS.values())


def test_other_scores_at_other_lengths_are_several_levels():
    study = study_with_lines("width")
    ablation = study.ablations["width"]
    figure = draw("sweep", study, ablation, results_of(study, ablation), references_of(study, score))
    levels = {label: line.get_ydata()[0] for label, line in lines_of(figure.axes[0]).items()}
    assert levels == {
        f"{WORDS[name]}, at {multiple:g}x length": score("ar", name, multiple) for name in NAMES for multiple in (1, 2)
    }
    assert len({line.get_color() for line in lines_of(figure.axes[0]).values()}) == 3


def test_a_contrast_has_the_level_of_the_length_of_its_panel():
    study = study_with_lines("position")
    ablation = study.ablations["position"]
    figure = draw("contrast", study, ablation, results_of(study, ablation), references_of(study, score))
    for axes, multiple in zip(figure.axes, (1, 2), strict=True):
        levels = {label: line.get_ydata()[0] for label, line in lines_of(axes).items()}
        assert levels == {WORDS[name]: score("ar", name, multiple) for name in NAMES}


def test_a_heatmap_has_a_row_per_reference_that_is_empty_for_other_tasks():
    study = study_with_lines("qkv_subsets")
    ablation = study.ablations["qkv_subsets"]
    results = results_of(study, ablation)
    figure = draw("heatmap", study, ablation, results, references_of(study, score))
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels[-2:] == list(WORDS.values())
    assert len(labels) == 2 + len(ablation.variants) + len(ablation.reference_variants)
    for axes, multiple in zip(figure.axes[:2], (1, 2), strict=True):
        values = axes.collections[0].get_array().reshape(len(labels), 3)
        expected = [[score(task, name, multiple)] * 2 for task, name in (("ar", "guess_value"), ("ar", "last_key_token"))]
        np.testing.assert_allclose(values[-2:, :2], expected)
        assert values.mask[-2:, 2].all(), "copying states none of them"
    without = draw("heatmap", study, ablation.model_copy(update={"reference_lines": ()}), results)
    assert [label.get_text() for label in without.axes[0].get_yticklabels()] == labels[:-2]


def test_a_figure_leaves_out_the_lines_that_its_tasks_do_not_state():
    study = study_with_lines("language")
    assert reference_words(study, study.ablations["language"]) == {}


def test_a_line_with_other_words_in_another_task_has_its_name(monkeypatch):
    monkeypatch.setattr(Copying, "reference_labels", {"guess_value": "guess anything"})
    study = study_with_lines("qkv_subsets")
    words = reference_words(study, study.ablations["qkv_subsets"])
    assert words == {"guess_value": "guess value", "last_key_token": WORDS["last_key_token"]}


def test_no_two_of_twelve_lines_look_the_same():
    looks = {(style["color"], style["linestyle"]) for style in map(_style, range(len(GREYS) * len(DASHES)))}
    assert len(looks) == 12


@pytest.mark.parametrize(
    ("edits", "line"),
    [
        (
            {"ablations.hybrid.reference_lines": ["gues_value"]},
            "ablations.hybrid: reference_lines: the tasks state no 'gues_value'; known are guess_value, last_key_token;"
            " did you mean 'guess_value'?",
        ),
        (
            {"ablations.hybrid.reference_lines": ["guess_value", "guess_value"]},
            "ablations.hybrid: reference_lines contains 'guess_value' twice",
        ),
        (
            {
                "ablations.width.plot": "filters",
                "ablations.width.x": MISSING,
                "ablations.width.reference_lines": ["guess_value"],
            },
            "ablations.width: plot = filters shows no reference_lines",
        ),
    ],
)
def test_an_unknown_reference_is_refused(edits, line):
    assert errors_of(edits) == [line]


def test_a_plot_whose_further_figures_show_references_may_name_them():
    study = study_with_lines("qk_norm")
    assert not load_plot(study.ablations["qk_norm"].plot).shows_references
    assert list(load_plot("attention").problems(study, study.ablations["qk_norm"])) == []
