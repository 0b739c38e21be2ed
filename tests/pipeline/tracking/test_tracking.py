"""The MLflow store agrees with the files: complete, no duplicates, rebuilt if lost, DVC experiments kept apart."""

import json
import re
import shutil
import sqlite3
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import parse_qs, quote, unquote

import numpy as np
import pandas as pd
import pytest
import torch

from pipeline.config.grid import cells, shown_variants
from pipeline.config.load import load_study
from pipeline.config.names import NAME
from pipeline.config.outputs import clashes
from pipeline.reporting.labels import variant_label
from pipeline.storage.live import LiveWriter
from pipeline.storage.runs import load_model
from pipeline.tracking import records
from pipeline.tracking.records import report_record
from pipeline.tracking.store import STAMP, load_run
from tests.helpers.processes import run_code
from tests.helpers.study import edit, shared_study, stage

pytestmark = pytest.mark.xdist_group("tracking")  # one process makes the store
RUNS_OF_QK = {"qk", "qk seed 0", "qk seed 1"}


@pytest.fixture(scope="module")
def tracked_folder(tmp_path_factory):
    """A finished study of one task, with its store."""
    folder = shutil.copytree(shared_study(tmp_path_factory, tasks=["copying"]), tmp_path_factory.mktemp("tracked") / "study")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.delenv("DVC_EXP_NAME", raising=False)
        stage("track")
    return folder


@pytest.fixture
def store(tracked_folder, monkeypatch):
    """The store of the tracked study, which is the working folder; a test must undo its changes."""
    monkeypatch.chdir(tracked_folder)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("DVC_EXP_NAME", raising=False)
    from mlflow.tracking import MlflowClient

    return MlflowClient("sqlite:///mlflow.db")


def slug(run):
    """`qk` for the run of a variant, `qk seed 0` for that of a seed; with the DVC experiment, if any."""
    tags = run.data.tags
    name = {"variant": "{variant}", "seed": "{variant} seed {seed}", "report": "report"}[tags["kind"]].format(**tags)
    return name if tags["cat.context"] == "workspace" else f"{name} ({tags['cat.context']})"


def search(client, experiment, filter_string=""):
    return client.search_runs([client.get_experiment_by_name(experiment).experiment_id], filter_string, max_results=1000)


def current(client, experiment="copying"):
    """Slug -> current run; each must be unique."""
    page = search(client, experiment, "tags.current = 'yes'")
    runs = {slug(run): run for run in page}
    assert len(runs) == len(page)
    return runs


def ids(client):
    return {name: run.info.run_id for name, run in current(client).items()}


def older(client, experiment="copying"):
    """Slug -> run of older studies."""
    return {slug(run): run for run in search(client, experiment, "tags.current = 'no'")}


def test_every_variant_and_every_seed_has_a_run(store):
    study = load_study()
    runs = current(store)
    variants = {cell.variant for cell in cells(study)}
    assert set(runs) == variants | {f"{variant} seed {seed}" for variant in variants for seed in (0, 1)}
    assert len({frozenset(run.data.params) for run in runs.values()}) == 1, "every run has the same parameter keys"
    run = runs["qk seed 1"]
    label = variant_label(study, "qk")
    assert label.startswith("CAT-QK")
    assert (runs["qk"].info.run_name, run.info.run_name) == (f"{label} (qk)", f"{label} (qk) seed 1")
    assert run.info.status == "FINISHED"
    assert {k: run.data.params[k] for k in ("variant", "label", "seed", "model.conv_q", "model.conv_k", "model.conv_v")} == {
        "variant": "qk", "label": label, "seed": "1", "model.conv_q": "3", "model.conv_k": "3", "model.conv_v": "-",
    }  # fmt: skip
    assert run.data.params["model.qk_norm"] == "true"
    training = {
        "steps": "5",
        "learning_rate": "0.005",
        "weight_decay": "0.01",
        "grad_clip": "1",
        "micro_batch": "-",
        "compile": "-",
    }
    assert {key: run.data.params[key] for key in training} == training
    assert {"task", "variant", "label", "seed", "data_digest", "device", "figure.qkv_subsets"} <= set(run.data.tags)
    lengths = {metric.step for metric in store.get_metric_history(run.info.run_id, "test/accuracy_by_length")}
    assert lengths == set(study.tasks["copying"].data.lengths)
    assert [m.step for m in store.get_metric_history(run.info.run_id, "valid/loss")] == [5]
    (dataset,) = run.inputs.dataset_inputs
    assert dataset.dataset.name == "copying"
    assert dataset.dataset.digest == run.data.tags["data_digest"]
    assert {item.path for item in store.list_artifacts(runs["qk"].info.run_id)} == {"history.csv", "summary.json"}
    assert [item.path for item in store.list_artifacts(run.info.run_id, "weights")] == ["weights/seed_1.safetensors"]
    (report,) = current(store, "study").values()
    artifacts = {item.path for item in store.list_artifacts(report.info.run_id)}
    assert artifacts == {"claims.yaml", "figures", "params.yaml", "report.html", "report.md", "tables", "training.csv"}


def test_a_variant_s_run_has_the_mean_and_deviation_of_its_seeds_and_contains_them(store):
    runs, study = current(store), load_study()
    seeds = [runs[f"qk seed {seed}"] for seed in (0, 1)]
    assert {run.data.tags["mlflow.parentRunId"] for run in seeds} == {runs["qk"].info.run_id}
    for name in ("accuracy_1x", "accuracy_2x", "train/loss"):
        values = [run.data.metrics[name] for run in seeds]
        assert runs["qk"].data.metrics[name] == pytest.approx(np.mean(values)), name
    assert runs["qk"].data.metrics["accuracy_2x_sd"] == pytest.approx(
        np.std([r.data.metrics["accuracy_2x"] for r in seeds], ddof=1)
    )
    means = {m.step: m.value for m in store.get_metric_history(runs["qk"].info.run_id, "test/accuracy_by_length")}
    assert set(means) == set(study.tasks["copying"].data.lengths)
    assert {run.data.tags["kind"] for run in runs.values()} == {"variant", "seed"}


def test_no_two_tables_of_the_report_have_one_place(store):
    (report,) = current(store, "study").values()
    folders = {item.path for item in store.list_artifacts(report.info.run_id, "tables/results")}
    subfolders = {f"tables/results/{name}" for name in ("filters", "rates", "references")}
    assert folders == {"tables/results/copying.csv", *subfolders}
    tables = [path for record in [report_record(load_study())] for paths in record.files.values() for path in paths]
    places = [f"{folder}/{path.name}" for folder, paths in report_record(load_study()).files.items() for path in paths]
    assert len(set(places)) == len(places) == len(tables)


def test_no_task_may_have_the_name_of_another_experiment_or_file(store):
    study = load_study()
    experiments = {experiment.name for experiment in store.search_experiments()}
    files = {path.name for path in Path("mlartifacts").iterdir() if re.fullmatch(NAME, path.name)}
    taken = (experiments | files) - study.tasks.keys()
    assert taken == {"study", "stamp"}
    for name in taken:
        tasks = {**study.tasks, name: study.tasks["copying"]}
        assert [line.split(":")[0] for line in clashes(study.model_copy(update={"tasks": tasks}))] == [f"tasks.{name}"]


def links_of(text):
    """The addresses of a description as MLflow's Markdown reads them: a quote or a space ends an address."""
    whole = re.findall(r"\]\(([^)]*)\)", text)
    assert all(re.fullmatch(r"[\w#/?&=%.~-]+", link) for link in whole), whole
    return whole


def follow(store, link):
    """Find what an address shows: the runs of a search or a saved view, or the file of a run. Fails if it is a dead link."""
    path, _, query = link.removeprefix("#/").partition("?")
    options = {name: value for name, (value,) in parse_qs(query, strict_parsing=True).items()}
    if path == "get-artifact":
        return artifact(store, options["run_uuid"], options["path"])
    assert options["workflowType"] == "machine_learning", "MLflow would open its page of language-model traces"
    if found := re.fullmatch(r"experiments/(\w+)/runs/(\w+)/artifacts/(.+)", path):
        assert store.get_run(found[2]).info.experiment_id == found[1]
        return artifact(store, found[2], unquote(found[3]))
    if path == "compare-experiments/s":
        return store.search_runs(json.loads(options["experiments"]), options["searchFilter"], max_results=1000)
    experiment = store.get_experiment(re.fullmatch(r"experiments/(\w+)/runs", path)[1])
    if "viewStateShareKey" not in options:
        return store.search_runs([experiment.experiment_id], options["searchFilter"], max_results=1000)
    view = json.loads(json.loads(experiment.tags[f"mlflow.sharedViewState.{options['viewStateShareKey']}"])["state"])
    order = f"{view['orderByKey']} {'ASC' if view['orderByAsc'] else 'DESC'}"
    return store.search_runs([experiment.experiment_id], view["searchFilter"], order_by=[order], max_results=1000)


def artifact(store, run_id, path):
    assert path in {item.path for item in store.list_artifacts(run_id, str(Path(path).parent).replace(".", ""))}
    return path


def test_every_link_of_the_store_leads_to_something(store):
    experiments = store.search_experiments()
    runs = store.search_runs([experiment.experiment_id for experiment in experiments], max_results=1000)
    notes = [item.tags["mlflow.note.content"] for item in experiments]
    notes += [run.data.tags["mlflow.note.content"] for run in runs]
    links = {link for note in notes for link in links_of(note)}
    empty = {link for link in links if not follow(store, link)}
    assert {unquote(link).rpartition("=")[2].removeprefix("cat-") for link in empty} <= {"CHART", "older", "experiments"}
    assert len(links) > len(empty) + 10
    assert all("cat-training" in link for link in empty if link.endswith("CHART")), "no run is in training"


def test_figures_and_runs_link_to_each_other(store):
    runs, (report,) = current(store), current(store, "study").values()
    note = runs["qk seed 0"].data.tags["mlflow.note.content"]
    artifacts = {follow(store, link) for link in links_of(note)}
    assert "figures/qkv_subsets.svg" in artifacts
    (image, *_) = [
        follow(store, link) for link in links_of(runs["qk"].data.tags["mlflow.note.content"]) if "get-artifact" in link
    ]
    assert image == "figures/qkv_subsets.svg", "the page of a variant shows its figures"

    (link,) = re.findall(r"\[qkv_subsets\]\((#/[^)]+)\)", report.data.tags["mlflow.note.content"])
    linked = follow(store, link)
    shown = shown_variants(load_study().ablations["qkv_subsets"])
    assert {run.data.tags["variant"] for run in linked} == set(shown)
    assert len(linked) == len(shown) * (1 + 2)


def test_statements_of_any_length_leave_the_links_of_the_note(copied):
    table = pd.read_csv("verdicts/claims.csv", keep_default_na=False)
    table["statement"] = "long " * 2000
    table.to_csv("verdicts/claims.csv", index=False)
    code, printed = track_result()
    assert (code, printed) == (0, [])
    (report,) = current(client_of(copied), "study").values()
    note = report.data.tags["mlflow.note.content"]
    assert len(note) == 8000
    assert "[qkv_subsets](#/" in note


def views_of(store, experiment="copying"):
    """Name -> address of the links in the description of an experiment."""
    note = store.get_experiment_by_name(experiment).tags["mlflow.note.content"]
    return dict(re.findall(r"\[(.*)\]\((#/[^)]+)\)", note))


def test_an_experiment_s_note_names_the_task_and_links_to_its_best_variant_and_seeds(store):
    experiment = store.get_experiment_by_name("copying")
    assert "selective copying" in experiment.tags["mlflow.note.content"]
    assert "\n\n    BOS " in experiment.tags["mlflow.note.content"], "an example of the task"
    assert load_study().ablations["qkv_subsets"].question in experiment.tags["mlflow.note.content"]
    views = views_of(store)
    best, seeds = follow(store, views["variants, best first by `accuracy_2x`"]), follow(store, views["seeds, best first"])
    assert best[0].data.tags["variant"] == "construction"
    assert ({run.data.tags["kind"] for run in best}, {run.data.tags["kind"] for run in seeds}) == ({"variant"}, {"seed"})
    assert len(seeds) == 2 * len(best)
    chart = follow(store, views["chart of `test/accuracy_by_length`: variants of qkv_subsets"])
    assert {run.data.tags["variant"] for run in chart} == set(shown_variants(load_study().ablations["qkv_subsets"]))


def test_the_best_variants_show_their_metric(store):
    experiment = store.get_experiment_by_name("copying")
    view = json.loads(json.loads(experiment.tags["mlflow.sharedViewState.cat-best"])["state"])
    metric = view["selectedColumns"][0].removeprefix("metrics.").strip("`")
    assert view["orderByKey"] == f"metrics.`{metric}`"
    assert metric in current(store)["qk"].data.metrics


def test_the_test_metric_of_a_table_is_that_of_the_training_length(store):
    for run in current(store).values():
        assert run.data.metrics["test/accuracy"] == run.data.metrics["accuracy_1x"]


def test_the_report_links_to_each_task_and_has_its_commit(store, monkeypatch):
    note = store.get_experiment_by_name("study").tags["mlflow.note.content"]
    assert all(follow(store, link) for link in links_of(note) if "training" not in link)
    monkeypatch.setattr(records, "provenance", lambda: {"commit": "abc", "dirty": False, "experiment": None})
    assert report_record(load_study()).origin == {"commit": "abc", "dirty": "false"}


def test_the_addresses_of_the_pages_are_printed_even_if_results_are_missing(copied):
    """As when `make ui` opens the pages while the first run trains."""
    Path("results/copying.csv").unlink()
    shutil.rmtree("mlartifacts")
    Path("mlflow.db").unlink()
    command = [sys.executable, "-m", "pipeline", "track", "--address", "http://here:1"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "track: results/copying.csv: is missing; run `dvc repro`\n" in done.stderr
    index, best = [line.partition(": http://here:1/")[2] for line in done.stdout.splitlines()]
    client = client_of(copied)
    assert follow(client, best) == []
    assert links_of(client.get_experiment(re.search(r"experiments/(\w+)", index)[1]).tags["mlflow.note.content"])


def test_views_of_a_study_without_their_ablation_are_deleted(copied):
    client = client_of(copied)
    experiment_id = client.get_experiment_by_name("copying").experiment_id
    for key in ("cat-chart-gone", "own"):
        client.set_experiment_tag(experiment_id, f"mlflow.sharedViewState.{key}", "{}")
    track()
    tags = client.get_experiment(experiment_id).tags
    assert "mlflow.sharedViewState.own" in tags
    assert "mlflow.sharedViewState.cat-chart-gone" not in tags


def test_the_code_in_a_run_s_note_loads_its_model(store):
    run = current(store)["qk seed 1"]
    (lines,) = re.findall(r"```python\n(.*?)```", run.data.tags["mlflow.note.content"], flags=re.DOTALL)
    names = {}
    exec(lines, names)
    weights = load_model("runs/copying/qk/seed_1.safetensors").state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in names["model"].state_dict().items())
    for run_id, line in ((current(store)["qk"].info.run_id, "has no weights"), ("0" * 32, "not found")):
        with pytest.raises(ValueError, match=line):
            load_run(run_id)


def test_a_registered_model_loads_in_any_folder(copied, tmp_path):
    commands = (["track"], ["register", "copying", "qk"], ["register", "copying", "qk"])
    done = run_code(f"from pipeline.cli import main\nfor command in {commands}:\n    main(command, standalone_mode=False)")
    assert done.returncode == 0, done.stderr
    first, again = done.stdout.splitlines()
    assert re.fullmatch(r"copying, qk seed [01]: registered as version 1 of models:/copying@best", first)
    assert "is version 1 of models:/copying@best" in again
    seed = re.search(r"seed (\d)", first)[1]
    code = (
        "import sys, numpy, mlflow\nmlflow.set_tracking_uri(sys.argv[1])\n"
        "model = mlflow.pyfunc.load_model('models:/copying@best')\n"
        "assert model.metadata.signature is not None and model.input_example is not None\n"
        "numpy.save('out.npy', model.predict(numpy.arange(6)[None]))"
    )
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, f"sqlite:///{copied}/mlflow.db"], cwd=elsewhere, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    expected = load_model(f"runs/copying/qk/seed_{seed}.safetensors")(torch.arange(6)[None])
    assert np.allclose(np.load(elsewhere / "out.npy"), expected.detach().numpy())
    version = client_of(copied).get_model_version_by_alias("copying", "best")
    assert version.run_id == ids(client_of(copied))[f"qk seed {seed}"]
    assert set(ids(client_of(copied))) == set(current(client_of(copied)))


def test_a_second_call_changes_nothing(store):
    before, stamp = ids(store), STAMP.read_text()
    stage("track")
    assert (ids(store), STAMP.read_text()) == (before, stamp)
    STAMP.unlink()  # as DVC does before it runs the stage
    stage("track")
    assert (ids(store), STAMP.read_text()) == (before, stamp)


def test_the_final_runs_replace_those_in_training(copied):
    client = client_of(copied)
    before, experiment_id = ids(client), client.get_experiment_by_name("copying").experiment_id
    tags = {"kind": "live", "task": "copying", "variant": "qk", "cat.context": "workspace"}
    run_id = client.create_run(experiment_id, tags=tags).info.run_id
    writer = LiveWriter("copying", "qk", 5)
    track()
    assert client.get_run(run_id).info.lifecycle_stage == "active", "its cell is in training"
    writer.end("trained")
    client.set_terminated(run_id)
    track()
    assert client.get_run(run_id).info.lifecycle_stage == "deleted"
    assert ids(client) == before


def test_missing_unfinished_and_duplicate_runs_are_repaired(store):
    before = ids(store)
    store.delete_run(before["qk seed 0"])
    store.set_terminated(before["k seed 0"], "FAILED")
    original = store.get_run(before["none seed 0"])
    copy = store.create_run(original.info.experiment_id, run_name=original.info.run_name, tags=original.data.tags)
    store.set_terminated(copy.info.run_id)
    stage("track")
    after = ids(store)
    assert set(after) == set(before)
    assert {name for name in before if after[name] != before[name]} - {"none seed 0"} == {"qk seed 0", "k seed 0"}


def test_exactly_the_runs_of_a_changed_cell_are_replaced(store):
    before = ids(store)
    shutil.copytree("runs", "kept_runs")
    shutil.copytree("results", "kept_results")
    edit(**{"variants.qk.conv_k": 2})
    stage("train", "copying", "qk")
    stage("evaluate", "copying")
    stage("track")
    changed = ids(store)
    assert {name for name in before if changed[name] != before[name]} == RUNS_OF_QK
    kept = older(store)
    assert {name: run.info.run_id for name, run in kept.items()} == {name: before[name] for name in RUNS_OF_QK}
    assert kept["qk"].data.params["model.conv_k"] == "3"
    now = current(store)
    assert {run.data.tags["study"] for run in now.values()} == {now["qk"].data.tags["study"]}
    assert {run.data.tags["study"] for run in kept.values()} == {kept["qk"].data.tags["studies"]}
    assert now["k"].data.tags["studies"].split() == [kept["qk"].data.tags["study"], now["qk"].data.tags["study"]]
    edit(**{"variants.qk.conv_k": 3})
    for folder in ("runs", "results"):
        shutil.rmtree(folder)
        Path(f"kept_{folder}").rename(folder)
    stage("track")
    assert ids(store) == before, "the runs of the earlier study, whose files are back"
    assert {name: run.info.run_id for name, run in older(store).items()} == {name: changed[name] for name in RUNS_OF_QK}
    folders = [Path("mlartifacts/copying") / changed[name] for name in RUNS_OF_QK]
    assert all(folder.exists() for folder in folders)
    stage("track", "--prune")
    assert (older(store), ids(store)) == ({}, before)
    assert not any(folder.exists() for folder in folders)


def runs_of_first_link(store):
    """The runs behind the first link of the experiment's note."""
    return {run.info.run_id for run in follow(store, next(iter(views_of(store).values())))}


@pytest.mark.parametrize("name", ["tried", "both'and\""])
def test_an_experiment_of_dvc_logs_the_cells_that_it_changed_and_leaves_the_workspace_alone(store, name, monkeypatch):
    before, stamp = ids(store), STAMP.read_text()
    first, table = runs_of_first_link(store), Path("results/copying.csv").read_text()
    change_scores("qk")
    monkeypatch.setenv("DVC_EXP_NAME", name)
    stage("track")
    stage("track", "--prune")
    tried = [run for run in search(store, "copying") if run.data.tags["cat.context"] == quote(name)]
    assert {slug(run).removesuffix(f" ({quote(name)})") for run in tried} == RUNS_OF_QK
    assert {run.info.run_name.endswith(f" ({name})") for run in tried} == {True}
    assert runs_of_first_link(store) == first
    linked = follow(store, views_of(store)["runs of DVC experiments"])
    assert {run.info.run_id for run in linked} == {run.info.run_id for run in tried}
    Path("results/copying.csv").write_text(table)
    stage("track")
    assert STAMP.read_text() == stamp, "else dvc.lock would depend on the experiment"
    monkeypatch.delenv("DVC_EXP_NAME")
    stage("track")
    assert ids(store) == before, "the changed scores are gone, so the runs of the experiment are not current either"
    for run in tried:
        store.delete_run(run.info.run_id)


def test_a_lost_store_is_rebuilt(store, tmp_path, monkeypatch):
    for name in ("params.yaml", "claims.yaml", "data", "runs", "results", "verdicts", "reports"):
        (shutil.copytree if Path(name).is_dir() else shutil.copy)(name, tmp_path / name)
    names, stamp = set(ids(store)), STAMP.read_text()
    monkeypatch.chdir(tmp_path)
    track()
    assert STAMP.read_text() == stamp, "although the logs of the training are missing"
    assert set(ids(client_of(tmp_path))) == names


def track(*arguments):
    """Run the stage in a new process: within a process, MLflow caches `sqlite:///mlflow.db` whatever the folder."""
    code, errors = track_result(*arguments)
    assert code == 0, errors


def client_of(folder):
    from mlflow.tracking import MlflowClient

    return MlflowClient(f"sqlite:///{folder}/mlflow.db")


@pytest.fixture
def copied(store, tmp_path, monkeypatch):
    """The working folder: a copy of the tracked study with its store."""
    copy = shutil.copytree(Path.cwd(), tmp_path / "copy")
    monkeypatch.chdir(copy)
    return copy


def change_scores(variant):
    table = Path("results/copying.csv")
    lines = table.read_text().splitlines()
    wrong = [re.sub(r"[\d.]+$", "0.0625", line) if f",{variant}," in line else line for line in lines]
    assert wrong != lines
    table.write_text("\n".join(wrong) + "\n")


def modification_times(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def artifacts_are_in(client, folder):
    """Whether every run has artifacts, all of them in the folder."""
    runs = [*current(client).values(), *current(client, "study").values()]
    return all(
        run.info.artifact_uri.startswith(f"file://{folder}/mlartifacts/") and client.list_artifacts(run.info.run_id)
        for run in runs
    )


def test_a_copied_study_leaves_the_store_of_the_original_alone(store, copied, tracked_folder):
    names, before = set(ids(store)), modification_times(tracked_folder)
    change_scores("qk")
    track("--prune")
    assert modification_times(tracked_folder) == before
    client = client_of(copied)
    assert set(ids(client)) == names
    assert older(client) == {}
    assert artifacts_are_in(client, copied)
    removed = set(ids(store).values()) - set(ids(client).values())
    assert len(removed) == 3
    assert removed.isdisjoint(path.name for path in Path("mlartifacts/copying").iterdir())


def test_pruning_deletes_no_folder_outside_of_the_store(copied, tmp_path):
    """As in a copied store, for a run of a task that the study no longer has."""
    kept = tmp_path / "kept" / "artifacts"
    kept.mkdir(parents=True)
    track()
    with sqlite3.connect("mlflow.db") as connection:
        connection.execute("update runs set artifact_uri = ? where name like '% (qk)'", [kept.as_uri()])
    change_scores("qk")
    track("--prune")
    assert older(client_of(copied)) == {}
    assert kept.exists()


def test_a_moved_study_keeps_its_artifacts_and_older_studies(copied, tmp_path, monkeypatch):
    change_scores("qk")
    track()
    logged = ids(client_of(copied))
    moved = copied.rename(tmp_path / "moved %20 study")
    monkeypatch.chdir(moved)
    track()
    shutil.copy("mlflow.db", tmp_path)
    client = client_of(tmp_path)
    before = older(client)
    assert ids(client) == logged, "no run is logged again"
    assert set(before) == {"qk", "qk seed 0", "qk seed 1"}
    for run in [*before.values(), *current(client).values(), *current(client, "study").values()]:
        assert run.info.artifact_uri.startswith(f"{moved.as_uri()}/mlartifacts/")
        assert client.list_artifacts(run.info.run_id)


def test_lost_artifacts_are_logged_again(copied):
    track()
    shutil.rmtree("mlartifacts/copying")
    track()
    assert artifacts_are_in(client_of(copied), copied)


def test_a_damaged_store_is_an_error_of_one_line(copied, capsys):
    Path("mlflow.db").write_bytes(b"not a database" * 100)
    with pytest.raises(SystemExit) as stopped:
        stage("track", "--prune")
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("track: mlflow.db: file is not a database: the store is damaged. Fix: move ")


def test_the_folder_may_have_any_name(store, tmp_path, monkeypatch):
    name = "e?f g%20h #'i"
    folder = tmp_path / "within" / name
    folder.parent.mkdir()
    shutil.copytree(Path.cwd(), folder, ignore=shutil.ignore_patterns("mlflow.db", "mlartifacts"))
    monkeypatch.chdir(folder)
    track()
    assert [path.name for path in folder.parent.iterdir()] == [name]
    shutil.copy("mlflow.db", tmp_path)
    client = client_of(tmp_path)
    assert set(ids(client)) == set(ids(store))
    (report,) = current(client, "study").values()
    assert Path(f"mlartifacts/study/{report.info.run_id}/artifacts/report.md").exists()


def test_studies_of_two_folders_share_a_server(store, copied, tracked_folder, tmp_path, monkeypatch):
    from mlflow.tracking import MlflowClient

    server = f"sqlite:///{tmp_path}/server.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    client = MlflowClient(server)
    client.create_experiment("copying", artifact_location=(tmp_path / "copying").as_uri())
    client.create_experiment("study", artifact_location=(tmp_path / "study").as_uri())

    def runs():
        return {run.info.run_id: (slug(run), run.info.status, run.data.tags) for run in search(client, "copying")}

    def tags_but_studies(run):
        return run[:2], {name: value for name, value in run[2].items() if name != "studies"}

    monkeypatch.chdir(tracked_folder)
    stage("track")
    unfinished = ids(client)["k seed 0"]
    client.update_run(unfinished, status="RUNNING")
    first = runs()

    monkeypatch.chdir(copied)
    change_scores("qk")
    stage("track", "--prune")
    both = runs()
    for run_id, run in first.items():
        assert tags_but_studies(both[run_id]) == tags_but_studies(run)
    added = {name for run_id, (name, *_) in both.items() if run_id not in first}
    assert added == {"qk", "qk seed 0", "qk seed 1", "k seed 0"}, "only changed and unfinished runs are logged"

    shutil.copy(tracked_folder / "results" / "copying.csv", "results")
    stage("track", "--prune")
    after = runs()
    left = {name for run_id, (name, *_) in after.items() if run_id not in first}
    assert (left, first.keys() - after.keys()) == ({"k seed 0"}, set()), "its own runs are pruned"

    monkeypatch.chdir(tracked_folder)
    stage("track")
    assert unfinished not in runs(), "its own unfinished run is deleted"
    assert {name for name, *_ in runs().values()} == {name for name, *_ in first.values()}


def test_an_unreachable_server_is_an_error_of_one_line(store, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(SystemExit) as stopped:
        stage("track")
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("track: MLflow at http://127.0.0.1:9: ")


def create_store(*, first=""):
    code = f"from pathlib import Path\nfrom pipeline.tracking.store import create_store\n{first}\ncreate_store()"
    return run_code(code)


def test_an_interrupted_creation_leaves_no_store(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    interrupted = create_store(first="def interrupt(self, path): raise KeyboardInterrupt\nPath.replace = interrupt")
    assert "KeyboardInterrupt" in interrupted.stderr
    assert list(Path().glob(".mlflow.db.*.part/mlflow.db"))
    assert not Path("mlflow.db").exists()


def test_the_rest_of_an_interrupted_creation_is_not_reused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(".mlflow.db.x.part").mkdir()
    Path(".mlflow.db.x.part/mlflow.db").write_bytes(b"half of it")
    assert create_store().returncode == 0
    assert not list(Path().glob(".mlflow.db.*.part"))
    with sqlite3.connect("mlflow.db") as connection:
        assert connection.execute("select count(*) from runs").fetchone() == (0,)


def track_result(*arguments):
    """Run the stage in a new process; return its exit code and the lines of its errors."""
    done = run_code(f"from pipeline.cli import main\nmain({['track', *arguments]})")
    return done.returncode, done.stderr.splitlines()


def test_the_own_store_is_the_same_by_its_address(store, tmp_path, monkeypatch):
    folder = tmp_path / "a study?"
    shutil.copytree(Path.cwd(), folder, ignore=shutil.ignore_patterns("mlflow.db", "mlartifacts"))
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    track()
    assert not Path("mlruns").exists()
    moved = folder.rename(tmp_path / "moved study")
    monkeypatch.chdir(moved)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{quote(str(moved))}/mlflow.db")
    track()
    assert not folder.exists()
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert not (moved / "mlruns").exists()
    client = client_of(moved)
    for run in [*current(client).values(), *current(client, "study").values()]:
        assert run.info.artifact_uri.startswith(f"{moved.as_uri()}/mlartifacts/")
        assert client.list_artifacts(run.info.run_id)


def test_the_store_of_others_stays_as_it_is(copied):
    """An experiment with a name of ours, an own experiment with a copy of a run, runs with few tags, a deleted experiment.

    And a run in `Default`, which MLflow creates and the study deletes if it is empty.
    """
    track()
    client = client_of(copied)
    default = client.get_experiment_by_name("Default").experiment_id
    client.restore_experiment(default)
    copy = current(client)["k seed 0"].data.tags
    own = client.create_experiment("own", artifact_location=(copied / "own").as_uri())
    made = [client.create_run(own, tags=copy).info.run_id, client.create_run(default).info.run_id]
    for tags in ({}, {"cat.context": "workspace"}):
        made += [
            client.create_run(e, tags=tags).info.run_id for e in (own, client.get_experiment_by_name("copying").experiment_id)
        ]
    client.delete_experiment(client.get_experiment_by_name("study").experiment_id)
    before = {run_id: client.get_run(run_id).to_dictionary() for run_id in made}
    assert track_result() == (0, [])
    assert {run_id: client.get_run(run_id).to_dictionary() for run_id in made} == before
    assert "report" in current(client, "study")
    assert client.get_experiment(default).lifecycle_stage == "active"


def test_the_runs_of_a_task_that_the_study_no_longer_has_are_of_an_older_study(copied):
    track()
    client = client_of(copied)
    gone = client.create_experiment("gone", tags={"mlflow.note.content": "Task `gone`: of an older study"})
    tags = {**current(client)["k seed 0"].data.tags, "cat.key": "0"}
    run_id = client.create_run(gone, tags=tags).info.run_id
    client.set_terminated(run_id)
    track()
    assert client.get_run(run_id).data.tags["current"] == "no"
    track("--prune")
    assert client.get_run(run_id).info.lifecycle_stage == "deleted"


def test_an_experiment_that_another_program_created_gets_artifacts_of_the_study(copied):
    for name in ("mlflow.db", "mlartifacts"):
        (shutil.rmtree if Path(name).is_dir() else Path.unlink)(Path(name))
    client_of(copied).create_experiment("copying", artifact_location=(copied / "elsewhere").as_uri())
    track()
    assert artifacts_are_in(client_of(copied), copied)


def test_a_store_elsewhere_has_its_artifacts_beside_it(copied, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/other/runs.db")
    track()
    assert not Path("mlruns").exists()
    assert any((tmp_path / "other" / "mlruns" / "copying").rglob("history.csv"))
    (tmp_path / "study" / "mlartifacts").mkdir(parents=True)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/study/mlflow.db")
    track()
    assert any((tmp_path / "study" / "mlartifacts" / "copying").rglob("history.csv")), "as the store of a study"


class FailingServer(BaseHTTPRequestHandler):
    """Answers with `status`, or stops half way through an answer if that is None."""

    status = None

    def do_GET(self):
        if self.status is None:
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"experiment": {')
        else:
            self.send_error(self.status)

    def do_POST(self):
        self.do_GET()

    def log_message(self, *arguments):
        pass


@pytest.mark.parametrize("status", [503, None])
def test_a_server_that_fails_is_an_error_of_one_line(store, status, monkeypatch):
    handler = type("Handler", (FailingServer,), {"status": status})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:secret@127.0.0.1:{server.server_port}")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        code, lines = track_result()
        server.shutdown()
    assert (code, len(lines)) == (2, 1), lines
    assert lines[0].startswith(f"track: MLflow at http://127.0.0.1:{server.server_port}: ")
    assert ". Fix: check that the server runs" in lines[0]
    assert "secret" not in lines[0]


@pytest.mark.parametrize(
    ("uri", "fix"),
    [
        (
            "SQLITE:///mlflow.db",
            "set MLFLOW_TRACKING_URI to http://<server> or sqlite:///<file>, or remove it to",
        ),
        ("file:mlruns", "set MLFLOW_TRACKING_URI to "),
        ("mlruns", "set MLFLOW_TRACKING_URI to "),
        ("postgresql+nothing://me:secret@localhost/x", "set MLFLOW_TRACKING_URI to "),
        ("mssql://me:secret@localhost/x", "install the package of pyodbc"),
    ],
)
def test_an_address_that_cannot_be_used_is_an_error_of_one_line(store, uri, fix, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    code, lines = track_result()
    assert (code, len(lines)) == (2, 1), lines
    assert f". Fix: {fix}" in lines[0]
    assert "secret" not in lines[0]
    assert not Path("mlruns").exists()
