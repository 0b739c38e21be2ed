"""The report says what was found, what fails, and what was run; the figures of what is inside show the models as they are."""

import json
import os
import re
import shutil
import signal
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import seaborn as sns

from pipeline.config.claims import load as load_claims
from pipeline.config.errors import ParamsError
from pipeline.config.load import load_study
from pipeline.config.study import Ablation
from pipeline.figures.cost import pareto_front
from pipeline.figures.example import attention_on, read_example
from pipeline.figures.example_plot import example
from pipeline.figures.filters import filters
from pipeline.figures.stability import by_rate, every_run, stability
from pipeline.figures.style import draw_line, errorbar
from pipeline.reporting.diagnosis import diagnose
from pipeline.stages import render
from pipeline.storage import runs
from pipeline.storage.results import CURVES, primary, read_results
from pipeline.storage.training_log import read_log
from tests.helpers.study import edit, finished_study, stage


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        finished_study(folder, tasks=["ar", "copying"])
    return folder


def written():
    stage("report")
    return Path("reports/report.md").read_text()


def test_every_question_has_a_section_and_every_link_a_target(study):
    text = Path("reports/report.md").read_text()
    anchors = re.findall(r'^<a id="(\w+)"></a>$', text, flags=re.MULTILINE)
    assert anchors == ["claims", *(n for n, a in study.ablations.items() if a.variants or a.beside), "cost"]
    assert set(re.findall(r"\]\(#(\w+)\)", text)) <= {*anchors, *(claim.ablation for claim in load_claims().values())}
    images = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)
    assert {path for path in images if not (Path("reports") / path).exists()} == set()
    assert {f"figures/{path.name}" for path in Path("reports/figures").iterdir()} | {"cost.png"} == set(images)
    links = set(re.findall(r"\]\((\.\./[^)]+)\)", text))
    assert links >= {"../results/ar.csv", "../results/copying.csv", "../results/filters/ar.csv"}
    assert all((Path("reports") / link).exists() for link in links)


def test_what_was_run_is_what_the_logs_say(study):
    for path in Path("logs").rglob("*.json"):
        log = json.loads(path.read_text())
        path.write_text(json.dumps(log | {"commit": "abcdef0123456789", "dirty": False, "started": 0.0, "seconds": 100.0}))
    cells = len(list(Path("logs").rglob("*.json")))
    text = written()
    assert f"{cells} cells, seeds 0, 1, float32. Trained on CPU" in text
    assert f"1970-01-01, by commit `abcdef0123`, in {100 * cells:,} seconds" in text
    assert re.search(r"\| copying +\| k +\| +\d,?\d+ \| +50\.000 \|", text), "two runs took 100 seconds"


def test_a_cell_that_was_not_trained_here_is_not_given_another_s_time(study):
    summary = Path("runs/ar/k/summary.json")
    summary.write_text(summary.read_text() + "\n")
    assert read_log("ar", "k") is None
    assert "; 1 restored from a cache." in written()
    shutil.rmtree("logs")
    text = written()
    assert "Trained on CPU" in text
    assert "; not here, but restored from a cache." in text
    assert "seconds a run" in text


def test_the_preset_is_named(study):
    assert "It is that of no preset" in Path("reports/report.md").read_text()
    Path("presets").mkdir()
    Path("presets/mine.yaml").write_text("# the same, but for a remark\n" + Path("params.yaml").read_text())
    assert "It is that of presets/mine.yaml" in written()


def signs(study, results, variant="k", task="ar"):
    table = diagnose(study, results)
    here = table[(table["task"] == task) & (table["variant"] == variant)]
    return dict(zip(here["signature"], here["evidence"], strict=True))


@pytest.fixture
def planted(study):
    """Results in which `k` on `ar` is without fault, and a function that says otherwise: of (seed, multiple), or of a metric."""
    results = read_results(study)
    of_k = (results["task"] == "ar") & (results["variant"] == "k")
    results.loc[of_k & (results["metric"] == "accuracy"), "value"] = 1.0
    summary = Path("runs/ar/k/summary.json")
    about = json.loads(summary.read_text())
    for run in about["runs"]:
        run |= {"stop": "accuracy", "steps": 100}
    summary.write_text(json.dumps(about))
    flat = {"learning_rate": about["learning_rate"], **dict.fromkeys(CURVES, 1.0)}
    rows = [flat | {"seed": seed, "step": step} for seed in study.seeds for step in range(10, 101, 10)]
    pd.DataFrame(rows).to_csv("runs/ar/k/history.csv", index=False)

    def plant(value, metric="accuracy", **where):
        chosen = of_k & (results["metric"] == metric)
        for column, wanted in where.items():
            chosen &= results[column] == wanted
        assert chosen.any()
        results.loc[chosen, "value"] = value

    return results, plant


def test_a_cell_without_fault_has_no_sign(study, planted):
    assert signs(study, planted[0]) == {}


def test_poor_recall_says_where_attention_is(study, planted):
    results, plant = planted
    plant(0.4)
    plant(0.25, metric="attention_on_answer_1")
    assert signs(study, results) == {
        "poor recall": "accuracy 0.400 at the training length; attention on the answer's token 0.25: it looks elsewhere"
    }
    plant(0.75, metric="attention_on_answer_1")
    assert signs(study, results)["poor recall"].endswith("0.75: it looks there and reads something else")
    assert "poor copying" in signs(study, results, task="copying", variant="none")


def test_limited_length_generalisation_says_from_where(study, planted):
    results, plant = planted
    longest = max(study.tasks["ar"].data.multiples)
    plant(0.9, multiple=longest)
    (evidence,) = signs(study, results).values()
    assert evidence.startswith(f"accuracy 1.000 at 1x, 0.900 at {longest:g}x")
    plant(0.96, multiple=longest)
    assert signs(study, results) == {}
    plant(0.4)
    plant(0.0, multiple=longest)
    assert set(signs(study, results)) == {"poor recall"}, "what was not learnt cannot carry over"


def test_seeds_apart_spikes_and_unfinished_training_are_seen(study, planted):
    results, plant = planted
    plant(0.85, seed=1)
    assert signs(study, results) == {
        "poor recall": signs(study, results)["poor recall"],
        "unstable over seeds": "accuracy from 0.850 to 1.000 at the training length",
    }
    plant(1.0)
    history = pd.read_csv("runs/ar/k/history.csv")
    history.loc[(history["seed"] == 1) & (history["step"] == 50), "train_loss"] = 1.75
    history.to_csv("runs/ar/k/history.csv", index=False)
    assert signs(study, results) == {"loss spikes": "training loss rises: seed 1 by 0.75 nats up to step 50"}
    history["train_loss"] = 1.0
    history.loc[history["step"] < 100, "valid_accuracy"] = 0.9
    history.to_csv("runs/ar/k/history.csv", index=False)
    assert signs(study, results) == {}, "a run that ended because the task was solved is finished"
    path = Path("runs/ar/k/summary.json")
    path.write_text(path.read_text().replace('"stop": "accuracy"', '"stop": "steps"'))
    assert signs(study, results) == {
        "unfinished training": "validation accuracy still gained 0.100 in the last fifth of its steps"
    }


def test_only_what_is_gained_in_the_last_fifth_is_unfinished(study, planted):
    results, _ = planted
    path = Path("runs/ar/k/summary.json")
    path.write_text(path.read_text().replace('"stop": "accuracy"', '"stop": "steps"'))
    history = pd.read_csv("runs/ar/k/history.csv")
    history.loc[history["step"] < 80, "valid_accuracy"] = 0.9
    history.to_csv("runs/ar/k/history.csv", index=False)
    assert signs(study, results) == {}
    history.loc[history["step"] == 80, "valid_accuracy"] = 0.9
    history.to_csv("runs/ar/k/history.csv", index=False)
    assert set(signs(study, results)) == {"unfinished training"}


def test_divergence_is_counted(study, planted):
    results, plant = planted
    plant(np.nan, seed=1)
    path = Path("runs/ar/k/summary.json")
    about = json.loads(path.read_text())
    next(r for r in about["runs"] if (r["seed"], r["learning_rate"]) == (1, about["learning_rate"]))["stop"] = "diverged"
    path.write_text(json.dumps(about))
    assert signs(study, results) == {"diverged": "1 of 2 seeds: a loss that is not finite at step 100"}


def test_the_front_is_what_pays():
    points = {"cheap": (1.0, 0.2), "worse": (2.0, 0.1), "same": (2.0, 0.202), "better": (3.0, 0.9), "dear": (4.0, 0.9)}
    assert pareto_front(points) == ["cheap", "better"]
    assert pareto_front({}) == []


def test_a_theorem_reads_the_answers_and_the_frames_are_on_them(study):
    one = read_example("ar")
    weights = attention_on("ar", "theory", study.seeds, one)
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-5)
    np.testing.assert_allclose(weights[np.arange(len(weights)), one.sources], 1, atol=1e-3)
    ablation = Ablation(question="?", tasks=["ar"], variants=["theory"], plot="example")
    axes = example(study, ablation, read_results(study)).axes[0]
    assert [tuple(map(int, frame.get_xy())) for frame in axes.patches] == list(zip(one.sources, range(len(weights)), strict=True))
    labels = [label.get_text() for label in axes.get_xticklabels()]
    asked = [label.get_text() for label in axes.get_yticklabels()]
    assert [labels[at - 1] for at in one.sources] == asked, "the answer follows its key"
    assert axes.get_title() == "theory on ar: 1.00 on the answers"


def test_of_seeds_that_diverged_none_is_looked_at(study):
    runs.weights_path("ar", "k", 0).unlink()
    of_second = attention_on("ar", "k", [1], read_example("ar"))
    np.testing.assert_array_equal(attention_on("ar", "k", study.seeds, read_example("ar")), of_second)
    runs.weights_path("ar", "k", 1).unlink()
    assert attention_on("ar", "k", study.seeds, read_example("ar")) is None


def test_filters_are_drawn_beside_the_theorem_s(study):
    ablation = Ablation(question="?", tasks=["ar"], variants=["qk"], reference_variants=["theory"], plot="filters")
    _, keys, values = filters(study, ablation, primary(study, read_results(study))).axes
    table = pd.read_csv("results/filters/ar.csv")
    prescribed, *trained = [line for line in keys.lines if line.get_marker() not in ("None", "", None)]
    np.testing.assert_allclose(prescribed.get_ydata(), [0, 1])
    heads_and_seeds = [(head, seed) for head in (0, 1) for seed in study.seeds]
    for (head, seed), line in zip(heads_and_seeds, trained, strict=True):
        taps = table.query(f"variant == 'qk' and stream == 'k' and row == {head} and seed == {seed}")["value"].to_numpy()
        np.testing.assert_allclose(line.get_ydata(), taps / taps[np.abs(taps).argmax()])
    assert values.get_title() == "qk on ar: v, no filter"


def test_filters_of_which_no_run_is_left_are_an_empty_figure(study):
    pd.read_csv("results/filters/ar.csv").head(0).to_csv("results/filters/ar.csv", index=False)
    ablation = Ablation(question="?", tasks=["ar"], variants=["qk"], reference_variants=["theory"], plot="filters")
    axes = filters(study, ablation, primary(study, read_results(study))).axes
    assert [a.get_title() for a in axes] == ["no seed of any variant has ended with a filter", "", ""]


def test_a_question_about_the_inside_needs_no_stage_and_must_make_sense(study):
    edit(
        **{
            "ablations.inside": {
                "question": "?",
                "tasks": [],
                "variants": [],
                "across": ["ar"],
                "beside": ["k"],
                "figure": "filters",
            }
        }
    )
    stage("validate")
    for change, line in (
        ({"figure": "filters", "beside": ["none"]}, "figure = filters shows filters, and variant 'none' has none"),
        ({"figure": "example", "beside": ["mamba"]}, "figure = example shows weights of attention, and variant 'mamba' has none"),
        (
            {"figure": "example", "across": ["copying"], "beside": ["k"]},
            "figure = example shows one sequence of recall, which task 'copying' is not",
        ),
    ):
        edit(**{f"ablations.inside.{key}": value for key, value in change.items()})
        with pytest.raises(ParamsError) as error:
            load_study()
        assert error.value.lines == [f"params.yaml: ablations.inside: {line}"]


def test_stability_is_of_every_run_and_says_what_it_went_through(study):
    ablation = study.ablations["stability"]
    assert (ablation.figure, ablation.across) == ("stability", ("ar",))
    path = Path("runs/ar/k/history.csv")
    about = json.loads(Path("runs/ar/k/summary.json").read_text())
    rates = study.tasks["ar"].train.learning_rates
    flat = {
        "train_loss": 2.0,
        "peak_loss": 2.1,
        "gradient_norm": 3.0,
        "valid_loss": 2.0,
        "valid_accuracy": 0.5,
        "largest_logit": 4.0,
    }
    steps = [1, 3, 5]
    rows = [{"learning_rate": r, "seed": s, "step": at, **flat} for r in rates for s in study.seeds for at in steps]
    history = pd.DataFrame(rows)
    one = (history["learning_rate"] == rates[1]) & (history["seed"] == 1)
    history.loc[one & (history["step"] == 3), "train_loss"] = 1.5
    history.loc[one & (history["step"] == 5), ["peak_loss", "largest_logit"]] = [3.25, 50.0]
    history.loc[history["step"] == 1, "gradient_norm"] = 9.0
    history.to_csv(path, index=False)
    for run in about["runs"]:
        run |= {"valid_loss": 2.0, "attention_entropy": [[1.0, 2.0]]}
        if (run["learning_rate"], run["seed"]) == (rates[0], 0):
            run |= {"stop": "diverged", "valid_loss": None, "attention_entropy": None}
    Path("runs/ar/k/summary.json").write_text(json.dumps(about))
    table = every_run(study)
    pd.testing.assert_frame_equal(table, stability(study, ablation), check_dtype=False)
    assert set(table["variant"]) == set(ablation.beside)
    here = table[table["variant"] == "k"].set_index(["learning_rate", "seed"])
    assert len(here) == len(rates) * len(study.seeds)
    calm, spiked, lost = here.loc[(rates[1], 0)], here.loc[(rates[1], 1)], here.loc[(rates[0], 0)]
    assert calm["loss_rise"] == pytest.approx(0.1)  # above the lowest mean before, which is 2
    assert spiked["loss_rise"] == pytest.approx(3.25 - 1.5)
    assert (calm["largest_logit"], spiked["largest_logit"]) == (4, 50)
    assert calm["gradient_norm"] == 9  # warm-up ends before step 1 of 5
    assert (calm["entropy"], calm["entropy_by_head"]) == (1.5, "1.000 2.000")
    assert np.isnan([lost["valid_loss"], lost["entropy"]]).all()
    mamba = table[table["variant"] == "mamba"]
    assert mamba["largest_logit"].isna().all()
    assert mamba["gradient_norm"].gt(0).all()
    panels = by_rate(study, ablation, read_results(study)).axes
    crosses = [line for axes in panels for line in axes.lines if line.get_marker() == "x" and line.get_clip_on() is False]
    assert [list(line.get_xdata()) for line in crosses] == [[rates[0]]] * len(panels)
    assert len(panels[0].lines) > len(panels[3].lines)  # Mamba has no logits


def fails(study, ablation, results):
    raise ValueError("no figure of this")


def is_killed(study, ablation, results):
    os.kill(os.getpid(), signal.SIGKILL)


def drawn(folder=Path("reports")):
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("draw", "words"),
    [(fails, "no figure of this"), (is_killed, "a process that draws figures was killed, as when memory runs out")],
)
def test_a_figure_that_cannot_be_drawn_ends_all_in_one_line_and_leaves_what_was(study, monkeypatch, capsys, draw, words):
    edit(threads=2)
    before = drawn()
    others = render.figures_of
    monkeypatch.setattr(render, "figures_of", lambda name, ablation: others(name, ablation) | {"another": draw})
    with pytest.raises(SystemExit) as stopped:
        stage("render")
    assert (stopped.value.code, capsys.readouterr().err) == (2, f"render: {words}\n")
    assert drawn() == before


def test_a_line_is_as_seaborn_draws_it(study):
    """With seeds that have no value, and a step that has one seed."""
    steps, seeds = [1, 2, 3, 4], [0, 1, 2]
    table = pd.DataFrame([{"step": step, "value": step * seed + 0.3} for step in steps for seed in seeds])
    table.loc[[0, 1, 3, 9, 10, 11], "value"] = np.nan
    for spread in ("range", "sd"):
        shown = study.model_copy(update={"render": study.render.model_copy(update={"spread": spread})})
        figure, (own, other) = plt.subplots(1, 2)
        draw_line(shown, table, own, x="step", y="value", color="C1")
        sns.lineplot(table, x="step", y="value", ax=other, color="C1", errorbar=errorbar(shown), lw=1.8, ms=6)
        for ours, theirs in zip(own.lines, other.lines, strict=True):
            np.testing.assert_allclose(ours.get_xydata(), theirs.get_xydata(), rtol=1e-12)
        ((ours,), (theirs,)) = (axes.collections[0].get_paths() for axes in (own, other))
        np.testing.assert_allclose(ours.vertices, theirs.vertices, rtol=1e-12)
        plt.close(figure)
