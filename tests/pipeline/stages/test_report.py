"""The report: results, failures, provenance; figures of single models show these models."""

import html
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
from ruamel.yaml import YAML

from pipeline.config.claims import load as load_claims
from pipeline.config.errors import ParamsError
from pipeline.config.load import load_study
from pipeline.config.outputs import clashes
from pipeline.config.study import Ablation
from pipeline.figures.drawing.cost import pareto_front
from pipeline.figures.drawing.example_sequence import query_attention, read_example
from pipeline.figures.drawing.style import draw_line, errorbar
from pipeline.figures.heatmap import Heatmap
from pipeline.figures.stability import full_stability_table, stability_table
from pipeline.reporting.diagnosis import diagnose
from pipeline.reporting.markdown import escape
from pipeline.stages import render
from pipeline.storage import runs
from pipeline.storage.results import primary, read_references, read_results
from pipeline.storage.tables import CURVES
from pipeline.storage.training_log import read_log
from pipeline.tracking.records import report_record
from tests.helpers.figures import draw
from tests.helpers.study import ROOT, edit, stage

SEEDS = (0, 1)


def page_text():
    """The text of report.html, written anew."""
    stage("report")
    return re.sub("<[^>]*>", "", Path("reports/report.html").read_text())


def test_every_ablation_has_a_section_and_every_link_a_target(study):
    text = Path("reports/report.md").read_text()
    anchors = re.findall(r'^<a id="(\w+)"></a>$', text, flags=re.MULTILINE)
    assert anchors == [
        "claims",
        *(n for n, a in study.ablations.items() if a.variants or a.reference_variants),
        "cost",
        "glossary",
    ]
    assert set(re.findall(r"\]\(#(\w+)\)", text)) <= {*anchors, *(claim.ablation for claim in load_claims().values())}
    images = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)
    assert {path for path in images if not (Path("reports") / path).exists()} == set()
    assert {f"figures/{path.name}" for path in Path("reports/figures").iterdir()} == set(images)
    assert {path.suffix for path in Path("reports/figures").iterdir()} == {".svg"}
    links = set(re.findall(r"\]\((\.\./[^)]+)\)", text))
    assert links >= {"../results/ar.csv", "../results/copying.csv", "../results/filters/ar.csv"}
    assert all((Path("reports") / link).exists() for link in links)


def test_no_ablation_may_have_the_name_of_another_section_or_figure(study):
    page_text()
    files = {path.stem for path in Path("reports").rglob("*.svg")}
    anchors = set(re.findall(r'^<a id="(\w+)"></a>$', Path("reports/report.md").read_text(), flags=re.MULTILINE))
    taken = (files | anchors) - study.ablations.keys()
    assert {
        "claims",
        "glossary",
        "cost",
        "cost_by_parameters",
        "cost_by_time",
        "qkv_subsets_length",
        "qkv_subsets_training",
    } <= taken
    for name in taken:
        raw = {**study.ablations, name: Ablation(question="?", tasks=[], variants=[], plot="heatmap")}
        assert [line.split(":")[0] for line in clashes(study.model_copy(update={"ablations": raw}))] == [f"ablations.{name}"]


def test_text_of_the_user_is_shown_as_text(study):
    text = "Is ![a sketch](sketch.svg) | *better* than <b>`x`</b>, $5 [yes](no), </details> \\"
    edit(**{"ablations.qkv_subsets.question": text})
    claims = YAML(typ="safe").load(Path("claims.yaml"))
    name = next(name for name, claim in load_claims().items() if claim.variants == ("k",) or "ar" in claim.tasks)
    claims[name] |= {"statement": text, "tasks": ["ar"], "variants": ["k"], "multiples": [1], "baseline": 1.0}
    claims[name] |= {"ablation": "qkv_subsets", "test": "non_inferior"}
    with Path("claims.yaml").open("w") as file:
        YAML().dump({name: claims[name]}, file)
    for command in ("validate", "judge", "report"):
        stage(command)
    written = Path("reports/report.html").read_text()
    shown = html.escape(text, quote=False)
    assert f'<h2 id="qkv_subsets">{shown}</h2>' in written
    assert written.count(f">{shown} ({claims[name]['source']})</td>") == 1, "a claim is stated once"
    assert not re.search(r"&lt;/?(?:a|details|summary)\b", written.replace(shown, "")), "no raw tag"
    assert escape(text) in report_record(load_study()).note


def test_a_broken_preset_is_no_match(study):
    Path("presets").mkdir()
    Path("presets/a.yaml").write_text("a: [")
    Path("presets/b_.yaml").write_text(Path("params.yaml").read_text())
    assert "matches presets/b_.yaml" in page_text()


def test_the_page_has_the_times_dates_and_commits_of_the_logs(study):
    for path in Path("logs").rglob("*.json"):
        log = json.loads(path.read_text())
        path.write_text(json.dumps(log | {"commit": "abcdef0123456789", "dirty": False, "started": 0.0, "seconds": 100.0}))
    cells = len(list(Path("logs").rglob("*.json")))
    text = page_text()
    assert f"{cells} cells, seeds 0, 1, float32. Trained on CPU" in text
    assert f"1970-01-01, commit abcdef0123, {100 * cells:,} seconds of training in all" in text
    seconds = 100 / sum(run["steps"] for run in json.loads(Path("runs/copying/k/summary.json").read_text())["runs"])
    row = rf"selective copying \(copying\)\s+CAT-K[^\n]*\(k\)\s+[\d,.]+\s+[\d,.]+\s+{seconds:.3f}"
    assert re.search(row, text), "all steps took 100 seconds"


def test_the_report_in_git_does_not_depend_on_when_where_and_by_which_commit_it_was_trained(study):
    before = Path("reports/report.md").read_text()
    assert "seconds" not in before
    shutil.rmtree("logs")
    page_text()
    assert Path("reports/report.md").read_text() == before
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    written = {f"/{path}" for path in Path("reports").iterdir() if path.is_file()}
    assert written & set(ignored) == {"/reports/report.html", "/reports/cost_by_time.svg"}


def test_a_restored_cell_has_no_time(study):
    summary = Path("runs/ar/k/summary.json")
    summary.write_text(summary.read_text() + "\n")
    assert read_log("ar", "k") is None, "neither its own log nor the table in git is of this result"
    text = page_text()
    assert "; restored from a cache: 1." in text
    assert "score by time per step" in Path("reports/report.html").read_text()
    shutil.rmtree("logs")
    assert "restored from a cache: 1." in page_text(), "the table has the others"
    Path("reports/training.csv").unlink()
    text = page_text()
    assert "Trained on CPU" in text
    assert "; restored from a cache, so without dates and times." in text
    assert "score by time per step" not in Path("reports/report.html").read_text()


def test_the_preset_is_named(study):
    assert "matches no preset" in Path("reports/report.md").read_text()
    Path("presets").mkdir()
    Path("presets/mine.yaml").write_text("# the same, but for a comment\n" + Path("params.yaml").read_text())
    assert "matches presets/mine.yaml" in page_text()


def signs(study, results, variant="k", task="ar"):
    table = diagnose(study, results, read_references(study))
    here = table[(table["task"] == task) & (table["variant"] == variant)]
    return dict(zip(here["failure_mode"], here["evidence"], strict=True))


@pytest.fixture
def planted(study):
    """Results in which `k` on `ar` has no failure, and a function that changes values of its rows."""
    results = read_results(study)
    of_k = (results["task"] == "ar") & (results["variant"] == "k")
    results.loc[of_k & (results["metric"] == "accuracy"), "value"] = 1.0
    summary = Path("runs/ar/k/summary.json")
    about = json.loads(summary.read_text())
    for run in about["runs"]:
        run |= {"stop": "accuracy", "steps": 100}
    summary.write_text(json.dumps(about))
    flat = {"learning_rate": about["learning_rate"], **dict.fromkeys(CURVES, 1.0)}
    rows = [flat | {"seed": seed, "step": step} for seed in SEEDS for step in range(10, 101, 10)]
    pd.DataFrame(rows).to_csv("runs/ar/k/history.csv", index=False)

    def plant(value, metric="accuracy", **where):
        chosen = of_k & (results["metric"] == metric)
        for column, wanted in where.items():
            chosen &= results[column] == wanted
        assert chosen.any()
        results.loc[chosen, "value"] = value

    return results, plant


def test_a_sound_cell_has_no_failure(study, planted):
    assert signs(study, planted[0]) == {}


def test_poor_recall_shows_where_attention_is(study, planted):
    results, plant = planted
    plant(0.4)
    plant(0.25, metric="attention_on_answer_1")
    assert signs(study, results) == {
        "poor recall": "accuracy 0.400 at the training length; attention on the answer's token 0.25:"
        " the model attends to other tokens"
    }
    plant(0.75, metric="attention_on_answer_1")
    assert signs(study, results)["poor recall"].endswith("0.75: the model attends to it but gives another output")
    assert "poor copying" in signs(study, results, task="copying", variant="none")


@pytest.mark.parametrize(("distance", "named"), [(0.019, True), (-0.019, True), (0.021, False)])
def test_poor_recall_names_a_partial_strategy_that_is_as_good(distance, named, study, planted):
    results, plant = planted
    (value,) = read_references(study).query("task == 'ar' and multiple == 1")["value"]
    plant(value + distance)
    phrase = f"at the training length; as good as: guess a value of the context ({value:.3f}); attention"
    assert (phrase in signs(study, results)["poor recall"]) == named


def test_partial_strategies_stand_below_the_results(study):
    text = Path("reports/report.md").read_text()
    section = text.split('<a id="qkv_subsets"></a>')[1].split("<a id=")[0]
    (value,) = read_references(study).query("task == 'copying' and reference == 'any_uncopied' and multiple == 2")["value"]
    (row,) = [line for line in section.splitlines() if "guess a signal not yet copied, after right ones" in line]
    assert [cell.strip() for cell in row.split("|")][4] == f"{value:.3f}"
    assert section.index("partial strategy, without a model") > section.index("parameters |")


def test_a_figure_with_published_layers_lists_their_departures(study):
    text = Path("reports/report.md").read_text()
    sections = {name: text.split(f'<a id="{name}"></a>')[1].split("<a id=")[0] for name in ("baselines", "qkv_subsets")}
    (row,) = [line for line in sections["baselines"].splitlines() if line.startswith("| Based")]
    assert "| feature_width: null, window: 4 |" in " ".join(row.split())
    assert "departs from the published layer" not in sections["qkv_subsets"]


def test_limited_length_generalisation_shows_the_lengths(study, planted):
    results, plant = planted
    longest = max(study.tasks["ar"].data.multiples)
    plant(0.9, multiple=longest)
    (evidence,) = signs(study, results).values()
    assert evidence.startswith(f"accuracy 1.000 at 1x, 0.900 at {longest:g}x")
    plant(0.96, multiple=longest)
    assert signs(study, results) == {}
    plant(0.4)
    plant(0.0, multiple=longest)
    assert set(signs(study, results)) == {"poor recall"}, "a task that was not learned cannot generalise"


def test_unstable_seeds_spikes_and_unfinished_training_are_failures(study, planted):
    results, plant = planted
    plant(0.85, seed=1)
    assert signs(study, results) == {
        "poor recall": signs(study, results)["poor recall"],
        "unstable over seeds": "accuracy from 0.850 to 1.000 at the training length; 1 of 2 seeds solve it",
    }
    plant(1.0)
    history = pd.read_csv("runs/ar/k/history.csv")
    history.loc[(history["seed"] == 1) & (history["step"] == 50), "train_loss"] = 1.75
    history.to_csv("runs/ar/k/history.csv", index=False)
    assert signs(study, results) == {"loss spikes": "training loss rose: seed 1 by 0.75 nats at step 50"}
    history["train_loss"] = 1.0
    history.loc[history["step"] < 100, "valid_accuracy"] = 0.9
    history.to_csv("runs/ar/k/history.csv", index=False)
    assert signs(study, results) == {}, "a run that ended because the task was solved is finished"
    path = Path("runs/ar/k/summary.json")
    path.write_text(path.read_text().replace('"stop": "accuracy"', '"stop": "steps"'))
    assert signs(study, results) == {
        "unfinished training": "validation accuracy still improved by 0.100 in the last fifth of the steps"
    }


def test_only_a_gain_in_the_last_fifth_is_unfinished(study, planted):
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
    assert signs(study, results) == {"diverged": "1 of 2 seeds: non-finite loss at step 100"}


def test_the_front_has_the_best_variant_per_price():
    points = {"cheap": (1.0, 0.2), "worse": (2.0, 0.1), "same": (2.0, 0.202), "better": (3.0, 0.9), "dear": (4.0, 0.9)}
    assert pareto_front(points) == ["cheap", "better"]
    assert pareto_front({}) == []


def test_a_construction_attends_to_the_answers_in_the_frames(study):
    data = read_example("ar")
    weights = query_attention("ar", "construction", SEEDS, data)
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-5)
    np.testing.assert_allclose(weights[np.arange(len(weights)), data.answer_positions], 1, atol=1e-3)
    ablation = Ablation(question="?", tasks=["ar"], variants=["construction"], plot="example")
    axes = draw("example", study, ablation, read_results(study)).axes[0]
    frames = [tuple(map(int, frame.get_xy())) for frame in axes.patches]
    assert frames == list(zip(data.answer_positions, range(len(weights)), strict=True))
    labels = [label.get_text() for label in axes.get_xticklabels()]
    queries = [label.get_text() for label in axes.get_yticklabels()]
    assert [labels[position - 1] for position in data.answer_positions] == queries, "the answer follows its key"
    assert axes.get_title() == "Construction, not trained on associative recall (ar): 1.00 of the attention on the answers"


def test_a_diverged_seed_is_skipped(study):
    runs.weights_path("ar", "k", 0).unlink()
    of_second = query_attention("ar", "k", [1], read_example("ar"))
    np.testing.assert_array_equal(query_attention("ar", "k", SEEDS, read_example("ar")), of_second)
    runs.weights_path("ar", "k", 1).unlink()
    assert query_attention("ar", "k", SEEDS, read_example("ar")) is None


KERNELS = Ablation(question="?", tasks=["ar"], variants=["qk"], reference_variants=["construction"], plot="filters")


def test_kernels_are_drawn_with_those_of_the_construction(study):
    queries, keys = draw("filters", study, KERNELS, primary(study, read_results(study))).axes
    table = pd.read_csv("results/filters/ar.csv")
    constructed, *trained = [line for line in keys.lines if line.get_marker() not in ("None", "", None)]
    np.testing.assert_allclose(constructed.get_ydata(), [0, 1])
    heads_and_seeds = [(head, seed) for head in (0, 1) for seed in SEEDS]
    for (head, seed), line in zip(heads_and_seeds, trained, strict=True):
        rows = table.query(f"variant == 'qk' and projection == 'k' and head == {head} and seed == {seed}")
        kernel = rows["value"].to_numpy()
        np.testing.assert_allclose(line.get_ydata(), kernel / kernel[np.abs(kernel).argmax()])
    assert [axes.get_title() for axes in (queries, keys)] == ["CAT-QK, kernel 3: Q", "CAT-QK, kernel 3: K"]


def test_without_trained_kernels_the_figure_is_empty(study):
    pd.read_csv("results/filters/ar.csv").head(0).to_csv("results/filters/ar.csv", index=False)
    assert draw("filters", study, KERNELS, primary(study, read_results(study))).axes == []


def test_a_plot_of_models_needs_no_stage_and_suitable_variants(study):
    question = {"question": "?", "tasks": [], "variants": [], "reference_tasks": ["ar"]}
    edit(**{"ablations.inside": {**question, "reference_variants": ["k"], "plot": "filters"}})
    stage("validate")
    for change, words in (
        ({"plot": "filters", "reference_variants": ["none"]}, "'none'"),
        ({"plot": "example", "reference_variants": ["mamba"]}, "'mamba'"),
        ({"plot": "example", "reference_tasks": ["copying"], "reference_variants": ["k"]}, "'copying'"),
    ):
        edit(**{f"ablations.inside.{key}": value for key, value in change.items()})
        with pytest.raises(ParamsError) as error:
            load_study()
        (line,) = error.value.lines
        assert line.startswith(f"params.yaml: ablations.inside: plot = {change['plot']}")
        assert words in line


def test_stability_has_the_measures_of_every_run(study):
    ablation = study.ablations["stability"]
    assert (ablation.plot, ablation.reference_tasks) == ("stability", ("ar",))
    path = Path("runs/ar/k/history.csv")
    about = json.loads(Path("runs/ar/k/summary.json").read_text())
    rates = study.training["ar", "k"].learning_rates
    flat = {
        "train_loss": 2.0,
        "max_loss": 2.1,
        "grad_norm": 3.0,
        "valid_loss": 2.0,
        "valid_accuracy": 0.5,
        "max_logit": 4.0,
    }
    steps = [1, 3, 5]
    rows = [{"learning_rate": r, "seed": s, "step": step, **flat} for r in rates for s in SEEDS for step in steps]
    history = pd.DataFrame(rows)
    spiking = (history["learning_rate"] == rates[1]) & (history["seed"] == 1)
    history.loc[spiking & (history["step"] == 3), "train_loss"] = 1.5
    history.loc[spiking & (history["step"] == 5), ["max_loss", "max_logit"]] = [3.25, 50.0]
    history.loc[history["step"] == 1, "grad_norm"] = 9.0
    history.to_csv(path, index=False)
    for run in about["runs"]:
        run |= {"valid_loss": 2.0, "attention_entropy": [[1.0, 2.0]]}
        if (run["learning_rate"], run["seed"]) == (rates[0], 0):
            run |= {"stop": "diverged", "valid_loss": None, "attention_entropy": None}
    Path("runs/ar/k/summary.json").write_text(json.dumps(about))
    table = full_stability_table(study)
    pd.testing.assert_frame_equal(table, stability_table(study, ablation), check_dtype=False)
    assert set(table["variant"]) == set(ablation.reference_variants)
    runs_of_k = table[table["variant"] == "k"].set_index(["learning_rate", "seed"])
    assert len(runs_of_k) == len(rates) * len(SEEDS)
    calm, spiked, diverged = runs_of_k.loc[(rates[1], 0)], runs_of_k.loc[(rates[1], 1)], runs_of_k.loc[(rates[0], 0)]
    assert calm["loss_rise"] == pytest.approx(0.1)  # above the lowest mean before, which is 2
    assert spiked["loss_rise"] == pytest.approx(3.25 - 1.5)
    assert (calm["max_logit"], spiked["max_logit"]) == (4, 50)
    assert calm["grad_norm"] == 9  # warm-up ends before step 1 of 5
    assert (calm["entropy"], calm["entropy_by_head"]) == (1.5, "1.000 2.000")
    assert np.isnan([diverged["valid_loss"], diverged["entropy"]]).all()
    mamba = table[table["variant"] == "mamba"]
    assert mamba["max_logit"].isna().all()
    assert mamba["grad_norm"].gt(0).all()
    panels = draw("stability", study, ablation, read_results(study)).axes
    crosses = [line for axes in panels for line in axes.lines if line.get_marker() == "x" and line.get_clip_on() is False]
    assert [list(line.get_xdata()) for line in crosses] == [[rates[0]]] * len(panels)
    assert len(panels[0].lines) > len(panels[3].lines)  # Mamba has no logits


class Fails(Heatmap):
    def draw(self, study, ablation, results, references):
        raise ValueError("no figure of this")


class IsKilled(Heatmap):
    def draw(self, study, ablation, results, references):
        os.kill(os.getpid(), signal.SIGKILL)


def outputs(folder=Path("reports")):
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("plot", "words"),
    [(Fails(), "no figure of this"), (IsKilled(), "a process that draws figures was killed")],
)
def test_a_failing_figure_gives_one_line_and_keeps_the_old_outputs(study, monkeypatch, capsys, plot, words):
    edit(parallel_runs=2)
    before = outputs()
    others = render.figure_plots
    monkeypatch.setattr(render, "figure_plots", lambda name, ablation: others(name, ablation) | {"another": plot})
    with pytest.raises(SystemExit) as stopped:
        stage("render")
    (line,) = capsys.readouterr().err.splitlines()
    assert (stopped.value.code, line.startswith(f"render: {words}")) == (2, True)
    assert outputs() == before


def test_a_line_equals_seaborn_s(study):
    """Also for seeds without a value, and for a step with one seed."""
    steps, seeds = [1, 2, 3, 4], [0, 1, 2]
    table = pd.DataFrame([{"step": step, "value": step * seed + 0.3} for step in steps for seed in seeds])
    table.loc[[0, 1, 3, 9, 10, 11], "value"] = np.nan
    for band in ("range", "sd"):
        shown = study.model_copy(update={"render": study.render.model_copy(update={"error_band": band})})
        figure, (own, other) = plt.subplots(1, 2)
        draw_line(shown, table, own, x="step", y="value", color="C1")
        sns.lineplot(table, x="step", y="value", ax=other, color="C1", errorbar=errorbar(shown), lw=1.8, ms=6)
        for ours, theirs in zip(own.lines, other.lines, strict=True):
            np.testing.assert_allclose(ours.get_xydata(), theirs.get_xydata(), rtol=1e-12)
        ((ours,), (theirs,)) = (axes.collections[0].get_paths() for axes in (own, other))
        np.testing.assert_allclose(ours.vertices, theirs.vertices, rtol=1e-12)
        plt.close(figure)
