"""The figure of placements: scores and costs at the right rows, without a trained study."""

import itertools

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from cat.training.fit import build_model
from pipeline.config.grid import shown_on, shown_tasks
from pipeline.config.load import load_study
from pipeline.config.plots import load_plot
from pipeline.config.study import Ablation
from pipeline.figures import placement
from pipeline.storage import runs, training_log
from tests.helpers.figures import draw
from tests.helpers.study import ROOT

COSTS = {
    "none": (0, 128, 0),
    "k": (4, 128, 3 * 64),
    "kv_shift": (4, 128, 2 * 64),
    "token_shift": (3 * 64, 128, 3 * 64),
    "canon_a": (4 * 64, 128, 3 * 64),
    "canon_abcd": (4 * (64 + 192 + 64 + 128), 128, 3 * (64 + 192 + 64 + 128)),
    "multi_token": (6 * 11, 128, 5 * 64),
}
"""Width 64, kernel size 4: parameters added, cache per token and per sequence."""
ABLATION = Ablation(
    question="?", reference_tasks=("ar", "copying"), reference_variants=(*COSTS, "construction"), plot="placement"
)


@pytest.fixture
def study(monkeypatch):
    study = load_study(ROOT / "presets" / "reference-placement.yaml")

    def summary(task, variant):
        model = build_model(study.variants[variant], vocabulary=5, length=study.tasks[task].data.length, seed=0)
        parameters = sum(weight.numel() for weight in model.parameters())
        return {"parameters": parameters, "runs": [{"steps": 10}, {"steps": 30}]}

    def log(task, variant):
        return {"seconds": {"none": 8, "k": 12}[variant]} if variant in ("none", "k") and task == "ar" else None

    monkeypatch.setattr(runs, "read_summary", summary)
    monkeypatch.setattr(training_log, "read_log", log)
    return study


def test_each_variant_has_its_costs(study):
    costs = placement.cost_columns(study, ABLATION)
    assert {name: tuple(costs.loc[name]) for name in COSTS} == COSTS
    assert costs.loc["construction"].isna().all()


def test_times_are_relative_to_the_first_variant_and_only_in_the_html_report(study):
    times = placement.step_times(study, ABLATION)
    assert times.loc["k", "ar"] == pytest.approx(1.5)
    assert times["copying"].isna().all()
    plot = load_plot("placement")
    _, table = plot.timed_tables(study, ABLATION)
    assert "1.50" in table
    assert "1.50" not in "".join(plot.tables(study, ABLATION, pd.DataFrame()))


def test_scores_stand_beside_the_costs(study):
    scores = {
        (task, variant): round(0.3 + 0.01 * number, 2)
        for task in shown_tasks(study, ABLATION)
        for number, variant in enumerate(shown_on(study, ABLATION, task))
    }
    rows = [
        {"task": task, "variant": variant, "seed": seed, "multiple": multiple, "metric": "accuracy", "value": score + 0.1 * seed}
        for ((task, variant), score), seed, multiple in itertools.product(scores.items(), (0, 1), (1, 8))
    ]
    figure = draw("placement", study, ABLATION, pd.DataFrame(rows))
    at_length, at_eight, cost = figure.axes
    names = [label.get_text() for label in at_length.get_yticklabels()]
    assert len(names) == len(COSTS) + 1
    assert names[5] == "Transformer, Canon-ABCD (canon_abcd)"
    assert [label.get_text() for label in cost.get_xticklabels()] == [*placement.cost_columns(study, ABLATION)]
    shown = {(int(text.get_position()[1]), int(text.get_position()[0])): text.get_text() for text in cost.texts}
    row = [*COSTS].index("canon_abcd")
    assert [shown[y, x] for y, x in sorted(shown) if y == row] == ["1,792", "128", "1,344"]
    for axes in (at_length, at_eight):
        assert [label.get_text() for label in axes.get_xticklabels()] == [
            "associative recall (ar)",
            "selective copying (copying)",
        ]
        means = {(int(text.get_position()[1]), int(text.get_position()[0])): text.get_text() for text in axes.texts}
        assert means[row, 0] == f"{scores['ar', 'canon_abcd'] + 0.05:.2f}"
    plt.close(figure)


def test_the_first_variant_must_have_a_cost(study):
    plot = load_plot("placement")
    first = ABLATION.model_copy(update={"reference_variants": ("construction", "none")})
    assert [*plot.problems(study, ABLATION)] == []
    (problem,) = plot.problems(study, first)
    assert problem == "plot = placement compares costs with those of the first variant, but 'construction' is not trained"
    other = ABLATION.model_copy(update={"reference_variants": ("qkv_channel", "none")})
    assert [*plot.problems(study, other)] == [
        "plot = placement compares costs with those of 'qkv_channel', which is not trained on 'ar'"
    ]
