"""The stages on a tiny study: their outputs, their dependencies, and equal bits in every run."""

import hashlib
import json
import re
import shutil
import sys
from copy import deepcopy
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from pipeline.config.code_digest import is_declaration, modules_reached
from pipeline.config.errors import ParamsError
from pipeline.config.grid import cells, shown_tasks, shown_variants
from pipeline.config.load import load_study, study_of
from pipeline.config.outputs import figure_plots
from pipeline.reporting.labels import variant_label, with_slug
from pipeline.reporting.tables import carry_over_table, prediction_table
from pipeline.runtime import workers
from pipeline.runtime.devices import resolve_device
from pipeline.stages.plan import stage_files, stage_modules
from pipeline.stages.train import Job, Trained, choose_learning_rate
from pipeline.storage import runs
from pipeline.storage.files import atomic_write, write_csv
from pipeline.storage.results import orphans, primary, read_results
from pipeline.storage.task_data import read_meta, read_split, read_task
from tests.helpers.figures import draw
from tests.helpers.study import ROOT, edit, read_params, stage


@pytest.fixture
def study(finished, tmp_path, monkeypatch):
    """A copy of the finished study, as the working folder."""
    shutil.copytree(finished, tmp_path / "study")
    monkeypatch.chdir(tmp_path / "study")
    return tmp_path / "study"


def digests(folder):
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}


def test_the_metadata_describes_the_splits(study):
    meta, heldout = (json.loads(Path(folder, "ar/meta.json").read_text()) for folder in ("data", "heldout"))
    assert meta["config"]["pairs"] == heldout["config"]["pairs"] == 4
    assert heldout["lengths"] == [10, 20, 40]
    assert set(meta["splits"]) == {"train", "valid"} == {p.stem for p in Path("data/ar").glob("*.npz")}
    assert set(heldout["splits"]) == {"test_10", "test_20", "test_40"} == {p.stem for p in Path("heldout/ar").glob("*.npz")}
    for split, described in (meta["splits"] | heldout["splits"]).items():
        examples = read_split("ar", split)
        assert examples.inputs.shape == examples.targets.shape == (described["examples"], described["length"])
        assert examples.inputs.dtype == np.uint8
        assert examples.targets.dtype == np.int8
    assert read_meta("ar").vocabulary == meta["vocabulary"] > read_split("ar", "train").inputs.max()


BPE = {"tokens": "bpe", "vocabulary_size": 300}


@pytest.mark.parametrize(
    ("task", "changes"), [("ar", {}), ("copying", {}), ("text", {}), ("text", BPE), ("text", {"tokens": "words"})]
)
@pytest.mark.parametrize("test_changes", [{"test_examples": 31}, {"multiples": [1, 2, 3]}])
def test_training_data_do_not_depend_on_the_test_splits(study, task, changes, test_changes):
    Path("numbers.txt").write_text("".join(f"{n} and {n * n} are two numbers .\n" for n in range(3000)))
    if task == "text":
        edit(**{f"tasks.text.data.{key}": value for key, value in {"source": "numbers.txt", **changes}.items()})
    stage("generate", task)
    before, heldout, meta = digests(Path("data", task)), digests(Path("heldout", task)), read_meta(task)
    edit(**{f"tasks.{task}.data.{key}": value for key, value in test_changes.items()})
    stage("generate", task)
    assert digests(Path("data", task)) == before
    assert read_meta(task) == meta
    assert digests(Path("heldout", task)) != heldout
    assert read_task(task) == load_study().tasks[task].data


def test_training_needs_no_test_splits(study):
    """A construction depends on the longest length in params.yaml, not on the test splits."""
    before = digests(Path("runs"))
    shutil.rmtree("heldout")
    for task, variant in (("copying", "construction"), ("copying", "k"), ("text", "k")):
        stage("train", task, variant)
    assert digests(Path("runs")) == before
    edit(**{"tasks.copying.data.multiples": [1, 2, 8]})
    stage("train", "copying", "construction")
    stage("train", "copying", "k")
    after = digests(Path("runs"))
    assert {Path(name).parent for name in before if after[name] != before[name]} == {Path("copying/construction")}


def test_stages_give_equal_bits_for_any_parallel_runs(study):
    before = outputs()
    edit(parallel_runs=3)
    stage("generate", "ar")
    for variant in ("k", "mamba"):  # every job computes with one thread, whatever the mixer
        stage("train", "ar", variant)
    stage("evaluate", "ar")
    stage("render")
    assert before == outputs()


def outputs():
    """Digests of the outputs of the stages."""
    found = {}
    for folder in ("runs/ar", "data", "heldout", "results", "reports/figures", "reports/metrics"):
        found |= digests(Path(folder))
    return found | {
        name: Path("reports", name).read_bytes() for name in ("lengths.csv", "diagnosis.csv", "stability.csv", "headline.md")
    }


def test_a_cell_does_not_depend_on_other_cells(study):
    before = digests(Path("runs/copying/k"))
    edit(**{"defaults.training.seeds": [1]})
    stage("train", "copying", "k")
    after = digests(Path("runs/copying/k"))
    assert after["seed_1.safetensors"] == before["seed_1.safetensors"]
    assert "seed_0.safetensors" not in after


def test_initial_weights_depend_on_the_seed_only(study, monkeypatch):
    import pipeline.stages.train

    fit, initial = pipeline.stages.train.fit, {}

    def watched(model, *splits, seed, learning_rate, **options):
        initial[seed, learning_rate] = model.embedding.token.weight.detach().clone()
        return fit(model, *splits, seed=seed, learning_rate=learning_rate, **options)

    monkeypatch.setattr(pipeline.stages.train, "fit", watched)
    stage("train", "ar", "k")
    (first, second), (low, high) = (sorted({key[i] for key in initial}) for i in (0, 1))
    assert torch.equal(initial[first, low], initial[first, high])
    assert not torch.equal(initial[first, low], initial[second, low])


def test_a_saved_model_is_loaded(study):
    summary = runs.read_summary("ar", "k")
    model = runs.load_model(runs.weights_path("ar", "k", 1))
    assert sum(p.numel() for p in model.parameters()) == summary["parameters"]
    valid = read_split("ar", "valid")
    from cat.evaluation.scores import Split, score

    accuracy = score(model, Split.of(torch.tensor(valid.inputs), torch.tensor(valid.targets))).accuracy
    (run,) = [r for r in summary["runs"] if (r["seed"], r["learning_rate"]) == (1, summary["learning_rate"])]
    assert accuracy == run["valid_accuracy"]


def test_a_broken_weights_file_is_refused(study):
    path = runs.weights_path("ar", "k", 0)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"seed_0\.safetensors: is not a weights file"):
        runs.load_model(path)


def test_a_missing_seed_lists_the_others(study):
    shutil.copy(runs.weights_path("ar", "k", 1), runs.weights_path("ar", "k", 10))
    shutil.copy(runs.weights_path("ar", "k", 1), runs.weights_path("ar", "k", 2))
    with pytest.raises(
        ValueError, match=r"^runs/ar/k/seed_9.safetensors: is missing; runs/ar/k has seed_0, seed_1, seed_2, seed_10; "
    ):
        runs.load_model("runs/ar/k/seed_9.safetensors")
    with pytest.raises(ValueError, match=r"seed_9.safetensors: is missing; run `dvc repro`"):
        runs.load_model("runs/ar/kk/seed_9.safetensors")


def outcome(rate, seed, *, accuracy=0.5, loss=1.0, stop="steps"):
    from cat.training.fit import validation_record

    record = validation_record(1, [loss], [1.0], loss, accuracy, None)
    return Trained(Job(rate, seed), [] if stop == "diverged" else [record], 1, stop, 1, None, None, {}, {}, "CPU", 1.0)


def test_the_validation_split_chooses_the_learning_rate():
    better = [
        outcome(0.1, 0, accuracy=0.6),
        outcome(0.2, 0, accuracy=0.7),
        outcome(0.1, 1, accuracy=0.6),
        outcome(0.2, 1, accuracy=0.4),
    ]
    assert choose_learning_rate(better, "accuracy") == 0.1
    losses = [outcome(0.1, 0, accuracy=0.6, loss=2.0), outcome(0.2, 0, accuracy=0.5, loss=1.0)]
    assert choose_learning_rate(losses, "accuracy") == 0.1
    assert choose_learning_rate(losses, "loss") == 0.2
    equal = [outcome(0.1, 0, loss=2.0), outcome(0.2, 0, loss=1.0)]
    assert choose_learning_rate(equal, "accuracy") == 0.2
    unstable = [outcome(0.1, 0, accuracy=0.9), outcome(0.1, 1, stop="diverged"), outcome(0.2, 0), outcome(0.2, 1)]
    assert choose_learning_rate(unstable, "accuracy") == 0.2
    assert choose_learning_rate([outcome(0.1, 0, stop="diverged")], "accuracy") == 0.1


def test_a_diverged_seed_is_recorded_and_the_study_continues(study, monkeypatch):
    import pipeline.stages.train

    fit = pipeline.stages.train.fit

    def diverges(model, *splits, seed, **options):
        run = fit(model, *splits, seed=seed, **options)
        return run if seed != pipeline.stages.train.derive_seed(1, "copying", "batches") else type(run)(
            model=run.model, history=[], steps=3, stop="diverged"
        )  # fmt: skip

    monkeypatch.setattr(pipeline.stages.train, "fit", diverges)
    stage("train", "copying", "k")
    summary = runs.read_summary("copying", "k")
    assert [(r["stop"], r["steps"], r["valid_loss"] is None) for r in summary["runs"]] == [
        ("steps", 5, False),
        ("diverged", 3, True),
    ]
    assert not runs.weights_path("copying", "k", 1).exists()
    stage("evaluate", "copying")
    stage("render")
    stage("report")
    results = read_results(load_study())
    values = results[(results["task"] == "copying") & (results["variant"] == "k")].set_index("seed")["value"]
    assert values[1].isna().all()
    assert values[0].notna().all()
    assert "1 diverged" in Path("reports/report.md").read_text()


def test_results_are_one_tidy_table_of_the_grid(study):
    study_params = load_study()
    results = read_results(study_params)
    assert not results.duplicated(["task", "variant", "seed", "length", "metric"]).any()
    assert set(zip(results["task"], results["variant"], strict=True)) == {(c.task, c.variant) for c in cells(study_params)}
    learned = results[results["variant"] == "learned"]
    assert learned["length"].max() == 20
    text = results[results["task"] == "text"].pivot_table(index=["variant", "seed", "length"], columns="metric", values="value")
    np.testing.assert_allclose(text["perplexity"], np.exp(text["loss"]))
    np.testing.assert_allclose(text["bits_per_byte"], text["loss"] / np.log(2))
    copying = results[(results["task"] == "copying") & (results["length"] == 32)]
    assert set(copying["metric"]) == {"accuracy", "sequence_accuracy"}


def test_attention_and_kernels_are_measured_at_the_training_length(study):
    results = read_results(load_study())
    attention = results[results["metric"].str.startswith("attention_")]
    assert (attention["multiple"] == 1).all()
    assert not attention["variant"].isin(["mamba", "hyena", "delta", "gla"]).any()
    names = attention.groupby(["task", "variant"])["metric"].agg(set)
    assert names["ar", "qk"] == {"attention_entropy_1", "attention_on_answer_1"}
    assert names["copying", "qk_l2"] == names["ar", "qk"] | {"attention_entropy_2", "attention_on_answer_2"}
    assert names["text", "qk"] == {"attention_entropy_1"}
    assert attention["value"].notna().all()

    filters = pd.read_csv("results/filters/ar.csv")
    kernel = filters.query("variant == 'qk_full' and projection == 'q' and seed == 1 and head == 0")
    model = runs.load_model(runs.weights_path("ar", "qk_full", 1))
    np.testing.assert_allclose(kernel["value"], model.blocks[0].mixer.filters["q"].kernel[0].detach(), rtol=1e-5)
    assert list(kernel["lag"]) == list(range(20))


def test_a_missing_cell_is_an_error_and_an_orphan_is_ignored(study, monkeypatch, capsys):
    monkeypatch.setattr("pipeline.stages.render.draw_all", lambda study, pictures: None)
    path = Path("results/ar.csv")
    path.write_text("".join(line for line in path.read_text().splitlines(keepends=True) if ",k,1," not in line))
    with pytest.raises(SystemExit) as stopped:
        stage("render")
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "render: results/ar.csv: variant 'k' lacks seed 1 at length 10; run `dvc repro`\n"

    shutil.copytree("runs/ar/k", "runs/ar/old")
    assert list(orphans(load_study())) == [Path("runs/ar/old")]
    stage("evaluate", "ar")
    stage("render")
    assert capsys.readouterr().out == "ignored what is no longer part of the study. Fix: `rm -r runs/ar/old`\n"
    path.write_text(path.read_text() + "ar,old,0,20,accuracy,1.0\nar,k,99,20,accuracy,1.0\n")
    results = read_results(load_study())
    assert not results["variant"].eq("old").any()
    assert not results["seed"].eq(99).any()


def test_files_of_removed_tasks_are_reported(study, monkeypatch, capsys):
    monkeypatch.setattr("pipeline.stages.render.draw_all", lambda study, pictures: None)
    folders = ("results", "results/filters", "results/rates", "results/references")
    old = [*(Path(folder, "old.csv") for folder in folders), Path("scores/old.npz")]
    for path in old:
        shutil.copy(path.with_stem("ar"), path)
    Path("results/.old.csv.part").touch()
    assert list(orphans(load_study())) == old
    stage("render")
    (line,) = capsys.readouterr().out.splitlines()
    assert line == f"ignored what is no longer part of the study. Fix: `rm -r {' '.join(map(str, old))}`"


def test_the_report_has_the_tables_of_positions_and_recall(study):
    text = Path("reports/report.md").read_text()
    positions, recall = (text.split(f'<a id="{name}"></a>')[1].split("<a id=")[0] for name in ("positions", "recall"))
    assert "![positions](figures/positions.svg)" in positions
    assert "[results/text.csv](../results/text.csv)" in positions
    assert "![recall](figures/recall.svg)" in recall
    head, _, *rows = [[cell.strip() for cell in line.split("|")] for line in recall.splitlines() if line.startswith("|")]
    assert "share of gain" in head
    variants = ["k", "k", "qk", "qk", "mamba", "mamba"]
    labels = [with_slug(variant_label(load_study(), variant), variant) for variant in variants]
    assert [row[head.index("variant")] for row in rows] == labels
    assert {row[head.index("task")] for row in rows} == {"text"}
    assert re.search(r"Text: 0\.0% of the scored bytes follow 50 bytes", text, re.IGNORECASE)


def test_metrics_are_one_file_per_variant(study):
    metrics = json.loads(Path("reports/metrics/k.json").read_text())
    assert set(metrics) == {"ar", "copying", "text"}
    assert set(metrics["ar"]) == {"accuracy_1x", "accuracy_2x"}
    results = read_results(load_study())
    values = results.query("task == 'ar' and variant == 'k' and metric == 'accuracy' and multiple == 2")["value"]
    assert metrics["ar"]["accuracy_2x"] == pytest.approx(values.mean(), abs=1e-6)
    assert set(json.loads(Path("reports/metrics/learned.json").read_text())["ar"]) == {"accuracy_1x"}


def test_a_variant_keeps_its_style_when_others_are_added(study):
    from pipeline.figures.drawing.palette import style

    study_params = load_study()
    styles = {variant: style(study_params, variant) for variant in study_params.variants}
    edit(**{"variants.added": dict(read_params()["variants"]["k"])})
    edit(**{"ablations.qkv_subsets.variants": ["none", "k", "qk", "added"]})
    assert {v: style(load_study(), v) for v in styles} == styles


def test_a_construction_is_a_horizontal_line(study):
    study_params = load_study()
    scores = primary(study_params, read_results(study_params))
    for plot, name in (("sweep", "width"), ("contrast", "position")):
        axes = draw(plot, study_params, study_params.ablations[name], scores).axes
        lines = [line for a in axes for line in a.lines if line.get_label() == "construction"]
        assert [set(line.get_ydata()) for line in lines] == [{1.0}] * len(axes)
        assert all("onstruction" not in label.get_text() for a in axes for label in a.get_xticklabels())


def test_the_tables_of_carrying_over_count_runs(study):
    """Of four runs with a planted score at 1x and at the longest length, and a planted prediction."""
    assert pd.read_csv("results/rates/ar.csv").empty  # no figure of the tiny study shows several learning rates
    shown = {"question": "?", "tasks": [], "variants": [], "reference_tasks": ["ar"], "reference_variants": ["k"]}
    edit(**{"ablations.learning_rates": {**shown, "plot": "learning_rates"}})
    stage("evaluate", "ar")
    path = Path("runs/ar/k/summary.json")
    summary = json.loads(path.read_text())
    rates = pd.read_csv("results/rates/ar.csv")
    assert set(zip(rates["learning_rate"], rates["seed"], strict=True)) == {(r, s) for r in (0.005, 0.01) for s in (0, 1)}
    chosen = pd.read_csv("results/ar.csv").query("variant == 'k' and metric == 'accuracy'")
    again = rates[rates["learning_rate"] == summary["learning_rate"]]
    assert again["value"].tolist() == chosen["value"].tolist()
    data = load_study().tasks["ar"].data
    solved = {(0.005, 0): (1, 0), (0.005, 1): (0, 0), (0.01, 0): (1, 1), (0.01, 1): (1, 0)}
    for run in summary["runs"]:
        assert run["solves_every_length"] in (True, False)
        run["solves_every_length"] = run["seed"] == 0
        for length, value in zip((data.length, data.lengths[-1]), solved[run["learning_rate"], run["seed"]], strict=True):
            same = (rates["learning_rate"] == run["learning_rate"]) & (rates["seed"] == run["seed"])
            rates.loc[same & (rates["length"] == length), "value"] = value
    path.write_text(json.dumps(summary))
    rates.to_csv("results/rates/ar.csv", index=False, lineterminator="\n")
    ablation = load_study().ablations["learning_rates"]
    table = carry_over_table(load_study(), ablation)
    columns = ["variant", "learning_rate", "runs", "solves_1x", "carries_over", "share"]
    assert table[columns].to_numpy().tolist() == [["k", 0.005, 2, 1, 0, 0.0], ["k", 0.01, 2, 2, 1, 0.5]]
    hits = prediction_table(load_study(), ablation).to_numpy().tolist()
    assert hits == [["ar", "yes", 1, 1], ["ar", "no", 0, 2]]
    assert runs.read_summary("ar", "qk")["runs"][0]["solves_every_length"] is None


def test_a_construction_is_built_for_every_seed(study):
    summary = runs.read_summary("copying", "construction")
    assert [(run["stop"], run["steps"], run["valid_accuracy"]) for run in summary["runs"]] == [("theorem", 0, 1.0)] * 2
    results = read_results(load_study()).query("variant == 'construction' and metric == 'accuracy'")
    assert set(results["task"]) == {"ar", "copying"}
    assert (results["value"] == 1).all()


def test_missing_weights_are_not_a_diverged_run(study, capsys):
    runs.weights_path("ar", "k", 0).unlink()
    with pytest.raises(SystemExit):
        stage("evaluate", "ar")
    assert "runs/ar/k/seed_0.safetensors: is missing; runs/ar/k has seed_1;" in capsys.readouterr().err


def test_a_write_is_atomic(tmp_path):
    target = tmp_path / "out"
    with atomic_write(target) as part:
        part.mkdir()
        (part / "a").write_text("old")
        assert not target.exists()
    with pytest.raises(FileNotFoundError), atomic_write(target) as part:  # noqa: PT012  the block is what is tested
        part.mkdir()
        (part / "missing" / "a").write_text("new")
    assert (target / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_written_numbers_round_trip(tmp_path):
    write_csv(tmp_path / "t.csv", [{"a": 0.1 + 0.2, "b": float("nan")}], ["a", "b"])
    assert (tmp_path / "t.csv").read_text() == "a,b\n0.30000000000000004,\n"


@pytest.mark.parametrize(("jobs", "parallel_runs", "count"), [(1, 4, 1), (3, 1, 1), (3, 2, 2), (31, 16, 16), (2, 4, 2)])
def test_at_most_parallel_runs_processes_are_started(jobs, parallel_runs, count):
    assert workers._processes(jobs, parallel_runs) == count


@pytest.mark.parametrize(("jobs", "cores", "count"), [(3, 1, 1), (1, 2, 1), (3, 2, 3), (4, 2, 2), (24, 16, 24), (25, 16, 16)])
def test_auto_runs_slightly_more_jobs_than_cores_at_once(jobs, cores, count, monkeypatch):
    monkeypatch.setattr(workers, "available", lambda: cores)
    assert workers._processes(jobs, "auto") == count


class TwoWordsError(Exception):
    def __init__(self, one, other):
        super().__init__(f"{one} {other}")


def _failing(kind, device, report):
    raise {"two": TwoWordsError("such", "words"), "params": ParamsError(["a: 1", "b: 2"])}[kind]


def test_an_error_of_a_worker_process_is_raised():
    with pytest.raises(RuntimeError, match=r"^TwoWordsError: such words$"):
        workers.parallel_map(_failing, ["two", "two"], device=torch.device("cpu"), parallel_runs=2)
    with pytest.raises(ParamsError) as raised:
        workers.parallel_map(_failing, ["params", "params"], device=torch.device("cpu"), parallel_runs=2)
    assert raised.value.lines == ["a: 1", "b: 2"]


@pytest.mark.parametrize("new", ["file", "folder"])
@pytest.mark.parametrize("old", ["file", "folder", "missing"])
def test_a_link_is_replaced_and_its_target_stays(tmp_path, old, new):
    """With DVC's cache.type symlink, the target is an object of the cache."""
    cache, out = tmp_path / "cache", tmp_path / "out"
    (cache / "folder").mkdir(parents=True)
    (cache / "folder" / "object").write_text("object")
    (cache / "file").write_text("object")
    out.symlink_to(cache / old)
    with atomic_write(out) as part:
        if new == "folder":
            part.mkdir()
        (part / "a" if new == "folder" else part).write_text("new")
    assert not out.is_symlink()
    assert (out / "a" if new == "folder" else out).read_text() == "new"
    assert {path.name: path.read_text() for path in cache.rglob("*") if path.is_file()} == {"object": "object", "file": "object"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "out"]


def test_an_output_is_written_below_a_linked_folder(tmp_path):
    """A user may link a folder, such as data/, to another disk."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "data").symlink_to(tmp_path / "disk")
    with atomic_write(tmp_path / "data" / "task") as part:
        part.mkdir()
    assert (tmp_path / "data").is_symlink()
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["task"]


@pytest.mark.parametrize("link", [Path.symlink_to, Path.hardlink_to])
def test_stages_by_hand_leave_the_targets_of_links_as_they_are(study, tmp_path, link):
    folders = [Path(name) for name in ("data", "heldout", "logs", "plan", "results", "runs", "scores") if Path(name).exists()]
    targets = {}
    for number, path in enumerate(path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()):
        (tmp_path / "cache").mkdir(exist_ok=True)
        target = path.rename(tmp_path / "cache" / str(number))
        targets[target] = target.read_bytes()
        link(path, target)
    edit(**{"defaults.training.seeds": [1]})
    for arguments in (["plan"], ["generate", "copying"], ["train", "copying", "none"], ["evaluate", "copying"]):
        stage(*arguments)
    assert {path: path.read_bytes() for path in targets} == targets
    assert any(path.suffix == ".safetensors" for path in Path("runs/copying/none").iterdir())


@pytest.mark.parametrize("file", [".dvcignore", ".gitignore"])
def test_the_temporary_names_of_an_atomic_write_are_ignored(tmp_path, monkeypatch, file):
    """The new folder, and the old one during the replacement: a kill may leave either."""
    names = set()
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda path, to: (names.update({path.name, Path(to).name}), replace(path, to)))
    for _ in range(2):
        with atomic_write(tmp_path / "out") as part:
            part.mkdir()
    patterns = (ROOT / file).read_text().splitlines()
    assert len(names) == 3
    assert {name for name in names if not any(fnmatch(name, pattern) for pattern in patterns)} == {"out"}


def test_a_folder_stays_if_it_cannot_be_replaced(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    replace = Path.replace

    def refuse(path, target):
        if path.name.endswith(".part"):
            raise PermissionError(13, "Permission denied")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(PermissionError), atomic_write(tmp_path / "out") as part:
        part.mkdir()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "old"]


def test_jobs_keep_their_order_and_report_progress():
    messages = []
    results = workers.parallel_map(_squared, [3, 1, 2], device=torch.device("cpu"), parallel_runs=2, report=messages.append)
    assert results == [9, 1, 4]
    assert sorted(messages) == [1, 2, 3]


def _squared(number, device, report):
    report(number)
    assert torch.get_num_threads() == 1
    return number**2


def test_a_missing_device_is_refused():
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(ParamsError, match="device = cuda:99: there is no such GPU here"):
        resolve_device("cuda:99")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("train", "ar", "kk"), "params.yaml: variants.kk: is missing; did you mean 'k'?\n"),
        (("train", "copying", "mamba"), "params.yaml: ablations: none trains 'mamba' on 'copying'; name both in one\n"),
        (("train", "arr", "k"), "params.yaml: tasks.arr: is missing; did you mean 'ar'?\n"),
        (("generate", "nope"), "params.yaml: tasks.nope: is missing\n"),
    ],
)
def test_unknown_names_give_one_line(study, capsys, arguments, line):
    with pytest.raises(SystemExit) as stopped:
        stage(*arguments)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == line


# The dependencies that dvc.yaml declares, and those that a stage uses.


def resolved_stages(folder):
    """Name -> stage, as DVC resolves it."""
    from dvc.repo import Repo

    with Repo.init(str(folder), no_scm=True) as repo:
        return {stage.name: stage for stage in repo.index.stages}


def each_plot_once():
    """`figure_plots` with each kind of plot for the first ablation that has it: the others run the same code."""
    drawn, study = set(), load_study()

    def new_figures(name, ablation):
        figures = {file: plot for file, plot in figure_plots(name, ablation).items() if plot.name not in drawn}
        if shown_tasks(study, ablation) and shown_variants(ablation):
            drawn.update(plot.name for plot in figures.values())
        return figures

    return new_figures


def executed_by(monkeypatch, *arguments):
    """The project's modules with a function that ran in a stage, except for those that results do not depend on.

    These are checks of params.yaml and the arguments, and the view of runs in training.
    """
    files, packages = set(), (str(ROOT / "cat"), str(ROOT / "pipeline"))
    loaded = load_study()
    monkeypatch.setattr("pipeline.cli.load_study", lambda: loaded)
    monkeypatch.setattr("pipeline.cli.check_cell", lambda *_: None)
    monkeypatch.setattr("pipeline.config.plots.scored_at_every_rate", lambda *_: [])  # `plan` writes what it returns
    monkeypatch.setattr("pipeline.stages.train.load_study", lambda: loaded)
    # Under a profile, matplotlib takes minutes to write the figures.
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path, **options: Path(path).touch())
    monkeypatch.setattr("pipeline.stages.render.figure_plots", each_plot_once())

    def note(frame, event, _):
        if event == "call" and frame.f_code.co_name != "<module>" and frame.f_code.co_filename.startswith(packages):
            files.add(frame.f_code.co_filename)

    sys.setprofile(note)
    try:
        stage(*arguments)
    finally:
        sys.setprofile(None)
    modules = {".".join(Path(file).relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in files}
    return modules - {
        "pipeline.cli", "pipeline.stages.live", "pipeline.storage.live", "pipeline.storage.training_log",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("plan", ("plan",)),
        ("generate@ar", ("generate", "ar")),
        ("generate@text", ("generate", "text")),
        ("train_qkv_subsets@ar-qk", ("train", "ar", "qk")),
        ("train_position@ar-learned", ("train", "ar", "learned")),
        *(
            (f"train_baselines@ar-{name}", ("train", "ar", name))
            for name in ("based", "performer", "delta", "gla", "mamba", "hyena")
        ),
        ("train_landmark@ar-landmark", ("train", "ar", "landmark")),
        ("train_construction@ar-construction", ("train", "ar", "construction")),
        ("train_construction@copying-construction", ("train", "copying", "construction")),
        ("evaluate@ar", ("evaluate", "ar")),
        ("evaluate@copying", ("evaluate", "copying")),
        ("render", ("render",)),
    ],
)
def test_a_stage_depends_on_the_code_that_it_runs(study, monkeypatch, name, arguments):
    """Code that ran, not only imports: a class statement does not use the class."""
    declared = set()
    modules = stage_modules(load_study())
    for dep in resolved_stages(study)[name].deps:
        path = Path(dep.def_path)
        if path.parts[0] == "plan":
            parts = path.relative_to("plan").with_suffix("").parts
            declared |= modules_reached(modules["/".join([parts[0], *parts[1:][-1:]])])
        elif path.name in ("cat", "pipeline"):
            declared |= {".".join(file.relative_to(ROOT).with_suffix("").parts) for file in (ROOT / path).rglob("*.py")}
    used = executed_by(monkeypatch, *arguments)
    assert len(used) >= 3
    assert {module for module in used - declared if not is_declaration(module)} == set()


@pytest.mark.parametrize(
    ("name", "arguments", "function"),
    [
        ("generate@ar", ("generate", "ar"), "pipeline.stages.generate.generate"),
        ("train_qkv_subsets@ar-qk", ("train", "ar", "qk"), "pipeline.stages.train.train"),
        ("evaluate@copying", ("evaluate", "copying"), "pipeline.stages.evaluate.evaluate"),
    ],
)
def test_a_stage_gets_exactly_its_declared_parameters(study, monkeypatch, name, arguments, function):
    """Changes every number of params.yaml in turn: the stage sees a change only if it depends on the key.

    That is a key of its `params` or, for training and evaluation, one that changes its file in plan/.
    """

    def watched(*received, device=None, parallel_runs=None, observe=None):
        # Evaluation needs the seeds; it gets all training settings because it removes the checkpoints of other runs.
        seen.append([{v: t.seeds for v, t in part.items()} if isinstance(part, dict) else part for part in received])

    monkeypatch.setattr(function, watched)
    deps = resolved_stages(study)[name].deps
    declared = {key for dep in deps for key in getattr(dep, "params", ())}
    (plan_file,) = (Path(dep.def_path).relative_to("plan").as_posix() for dep in deps if dep.def_path.startswith("plan/"))
    raw = read_params()
    changed = dict(leaves(raw))
    assert len(changed) > 60
    mutated = raw
    monkeypatch.setattr("pipeline.cli.load_study", lambda: study_of(mutated, "params.yaml"))  # parsing YAML each time is slow
    seen = []
    stage(*arguments)
    (before,) = seen
    planned = stage_files(load_study())[plan_file]
    reached = set()
    for path, value in changed.items():
        mutated = deepcopy(raw)
        section = mutated
        for key in path[:-1]:
            section = section[key]
        section[path[-1]] = OTHER[value] if isinstance(value, str) else value + 1 if isinstance(value, int) else value / 2
        seen.clear()
        try:
            stage(*arguments)
        except SystemExit:  # an invalid study
            continue
        is_declared = any(f"{'.'.join(map(str, path))}.".startswith(f"{key}.") for key in declared)
        is_declared |= stage_files(study_of(mutated, "params.yaml"))[plan_file] != planned
        assert (seen[0] != before) == is_declared, path
        reached |= {is_declared}
    assert reached == {True, False}


OTHER = {"float32": "bfloat16", "none": "sinusoidal", "uniform": "power", "power": "uniform", "all": "one", "sd": "range"}


def leaves(raw, path=()):
    if isinstance(raw, dict):
        for key, value in raw.items():
            yield from leaves(value, (*path, key))
    elif isinstance(raw, list):
        for index, value in enumerate(raw):
            yield from leaves(value, (*path, index))
    elif (isinstance(raw, int | float) and not isinstance(raw, bool)) or (isinstance(raw, str) and raw in OTHER):
        yield path, raw


def test_update_readme_keeps_the_text_around_the_headline(study):
    from pipeline.stages.render import README_MARKS

    Path("README.md").write_text(f"before\n{README_MARKS[0]}\nold\n{README_MARKS[1]}\nafter\n")
    stage("update-readme")
    text = Path("README.md").read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    headline = Path("reports/headline.md").read_text()
    assert headline.replace("](report.md#", "](reports/report.md#") in text
    for folder, shown in (("reports", headline), (".", text)):
        links = set(re.findall(r"\]\(([^)#]+)#\w+\)", shown))
        assert [Path(folder, link).resolve() for link in links] == [Path("reports/report.md").resolve()]
