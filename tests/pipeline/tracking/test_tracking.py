"""The MLflow store follows the files: complete, without doubles, rebuilt when lost, and apart for experiments."""

import re
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
import torch

from pipeline.config.grid import cells, shown_variants
from pipeline.config.load import load_study
from pipeline.storage.runs import load_model
from pipeline.tracking.store import STAMP, load_run
from tests.helpers.study import edit, finished_study, stage


@pytest.fixture(scope="module")
def tracked_folder(tmp_path_factory):
    """A finished study of one task, tracked once."""
    folder = tmp_path_factory.mktemp("tracked")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.delenv("DVC_EXP_NAME", raising=False)
        finished_study(folder, tasks=["copying"])
        stage("track")
    return folder


@pytest.fixture
def store(tracked_folder, monkeypatch):
    """The working folder of the test is the tracked study; what a test changes in the store it must put right."""
    monkeypatch.chdir(tracked_folder)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("DVC_EXP_NAME", raising=False)
    from mlflow.tracking import MlflowClient

    return MlflowClient("sqlite:///mlflow.db")


def found(client, experiment="copying"):
    """Run name -> run, and that no name stands twice."""
    page = client.search_runs([client.get_experiment_by_name(experiment).experiment_id], "tags.current = 'yes'", max_results=1000)
    runs = {run.info.run_name: run for run in page}
    assert len(runs) == len(page)
    return runs


def ids(client):
    return {name: run.info.run_id for name, run in found(client).items()}


def older(client, experiment="copying"):
    """The runs that the files no longer say."""
    page = client.search_runs([client.get_experiment_by_name(experiment).experiment_id], "tags.current = 'no'")
    return {run.info.run_name: run for run in page}


def test_there_is_a_run_for_every_variant_and_seed(store):
    study = load_study()
    runs = found(store)
    variants = {cell.variant for cell in cells(study)}
    assert set(runs) == variants | {f"{variant} seed {seed}" for variant in variants for seed in study.seeds}
    assert len({frozenset(run.data.params) for run in runs.values()}) == 1, "every run has the same parameter keys"
    run = runs["qk seed 1"]
    assert run.info.status == "FINISHED"
    assert {k: run.data.params[k] for k in ("variant", "seed", "model.q", "model.k", "model.v", "model.qk_norm")} == {
        "variant": "qk", "seed": "1", "model.q": "3", "model.k": "3", "model.v": "-", "model.qk_norm": "true",
    }  # fmt: skip
    assert {"task", "variant", "seed", "data_digest", "device", "figure.streams"} <= set(run.data.tags)
    lengths = {metric.step for metric in store.get_metric_history(run.info.run_id, "test/accuracy")}
    assert lengths == set(study.tasks["copying"].data.lengths)
    assert [m.step for m in store.get_metric_history(run.info.run_id, "valid/loss")] == [5]
    (dataset,) = run.inputs.dataset_inputs
    assert dataset.dataset.name == "copying"
    assert dataset.dataset.digest == run.data.tags["data_digest"]
    assert {item.path for item in store.list_artifacts(runs["qk"].info.run_id)} == {"history.csv", "summary.json"}
    assert [item.path for item in store.list_artifacts(run.info.run_id, "weights")] == ["weights/seed_1.safetensors"]
    (report,) = found(store, "study").values()
    there = {item.path for item in store.list_artifacts(report.info.run_id)}
    tables = {"claims.yaml", "cost.png", "figures", "params.yaml", "report.html", "report.md", "svg", "tables"}
    assert there == tables


def test_a_variant_s_run_has_the_mean_and_the_spread_of_its_seeds_which_are_within_it(store):
    runs, study = found(store), load_study()
    seeds = [runs[f"qk seed {seed}"] for seed in study.seeds]
    assert {run.data.tags["mlflow.parentRunId"] for run in seeds} == {runs["qk"].info.run_id}
    for name in ("accuracy_1x", "accuracy_2x", "train/loss"):
        values = [run.data.metrics[name] for run in seeds]
        assert runs["qk"].data.metrics[name] == pytest.approx(np.mean(values)), name
    assert runs["qk"].data.metrics["accuracy_2x_sd"] == pytest.approx(
        np.std([r.data.metrics["accuracy_2x"] for r in seeds], ddof=1)
    )
    means = {m.step: m.value for m in store.get_metric_history(runs["qk"].info.run_id, "test/accuracy")}
    assert set(means) == set(study.tasks["copying"].data.lengths)
    assert {run.data.tags["kind"] for run in runs.values()} == {"variant", "seed"}


def test_figures_and_runs_lead_to_each_other(store):
    runs, (report,) = found(store), found(store, "study").values()
    note = runs["qk seed 0"].data.tags["mlflow.note.content"]
    artifacts = re.findall(r"#/experiments/(\w+)/runs/(\w+)/artifacts/([^)]+)\)", note)
    assert {(e, r) for e, r, _ in artifacts} == {(report.info.experiment_id, report.info.run_id)}
    there = {item.path for folder in (None, "figures") for item in store.list_artifacts(report.info.run_id, folder)}
    assert "figures/streams.png" in {path for *_, path in artifacts} <= there

    (address,) = re.findall(r"\[streams\]\(#/([^)]+)\)", report.data.tags["mlflow.note.content"])
    wanted = parse_qs(urlsplit(address).query)["searchFilter"][0]
    names = {run.info.run_name for run in store.search_runs([runs["qk"].info.experiment_id], wanted, max_results=1000)}
    shown = shown_variants(load_study().ablations["streams"])
    assert names == {*shown, *(f"{variant} seed {seed}" for variant in shown for seed in (0, 1))}


def test_an_experiment_s_note_leads_to_the_best_variant_and_to_seeds(store):
    experiment = store.get_experiment_by_name("copying")
    links = re.findall(r"\(#/experiments/(\w+)/runs\?([^)]+)\)", experiment.tags["mlflow.note.content"])
    assert {number for number, _ in links} == {experiment.experiment_id}
    best, _, seeds, before, tried = (parse_qs(query) for _, query in links)
    ranked = store.search_runs([experiment.experiment_id], best["searchFilter"][0], order_by=[f"{best['orderByKey'][0]} DESC"])
    assert ranked[0].info.run_name == "theory"
    assert {run.data.tags["kind"] for run in ranked} == {"variant"}
    assert len(store.search_runs([experiment.experiment_id], seeds["searchFilter"][0])) == 2 * len(ranked)
    for nothing in (before, tried):
        assert store.search_runs([experiment.experiment_id], nothing["searchFilter"][0]) == []


def test_the_lines_of_a_run_s_note_load_its_model(store):
    run = found(store)["qk seed 1"]
    (lines,) = re.findall(r"```python\n(.*?)```", run.data.tags["mlflow.note.content"], flags=re.DOTALL)
    names = {}
    exec(lines, names)
    weights = load_model("runs/copying/qk/seed_1.safetensors").state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in names["model"].state_dict().items())
    for run_id, line in ((found(store)["qk"].info.run_id, "has no weights"), ("0" * 32, "not found")):
        with pytest.raises(ValueError, match=line):
            load_run(run_id)


def test_repeating_changes_nothing(store):
    before, stamp = ids(store), STAMP.read_text()
    stage("track")
    assert (ids(store), STAMP.read_text()) == (before, stamp)
    STAMP.unlink()  # as DVC does before it runs the stage
    stage("track")
    assert (ids(store), STAMP.read_text()) == (before, stamp)


def test_what_is_missing_unfinished_or_double_is_put_right(store):
    before = ids(store)
    store.delete_run(before["qk seed 0"])
    store.set_terminated(before["k seed 0"], "FAILED")
    original = store.get_run(before["none seed 0"])
    copy = store.create_run(original.info.experiment_id, run_name="none seed 0", tags=original.data.tags)
    store.set_terminated(copy.info.run_id)
    stage("track")
    after = ids(store)
    assert set(after) == set(before)
    assert {name for name in before if after[name] != before[name]} - {"none seed 0"} == {"qk seed 0", "k seed 0"}


def test_exactly_the_runs_of_a_changed_cell_are_replaced(store):
    before = ids(store)
    shutil.copytree("runs", "kept_runs")
    shutil.copytree("results", "kept_results")
    edit(**{"variants.qk.k": 2})
    stage("train", "copying", "qk")
    stage("evaluate", "copying")
    stage("track")
    changed = ids(store)
    of_qk = {"qk", "qk seed 0", "qk seed 1"}
    assert {name for name in before if changed[name] != before[name]} == of_qk
    kept = older(store)
    assert {name: run.info.run_id for name, run in kept.items()} == {name: before[name] for name in of_qk}
    assert kept["qk"].data.params["model.k"] == "3"
    here = found(store)
    assert {run.data.tags["study"] for run in here.values()} == {here["qk"].data.tags["study"]}
    assert {run.data.tags["study"] for run in kept.values()} == {kept["qk"].data.tags["studies"]}
    assert here["k"].data.tags["studies"].split() == [kept["qk"].data.tags["study"], here["qk"].data.tags["study"]]
    edit(**{"variants.qk.k": 3})
    for folder in ("runs", "results"):
        shutil.rmtree(folder)
        Path(f"kept_{folder}").rename(folder)
    stage("track")
    assert ids(store) == before, "the runs of the study that the files are of again"
    assert {name: run.info.run_id for name, run in older(store).items()} == {name: changed[name] for name in of_qk}
    folders = [Path("mlartifacts/copying") / changed[name] for name in of_qk]
    assert all(folder.exists() for folder in folders)
    stage("track", "--prune")
    assert (older(store), ids(store)) == ({}, before)
    assert not any(folder.exists() for folder in folders)


def best_of_note(store):
    """The runs that the first link in the note of an experiment shows."""
    experiment = store.get_experiment_by_name("copying")
    address = re.search(r"\(#/experiments/\w+/runs\?([^)]+)\)", experiment.tags["mlflow.note.content"])[1]
    page = store.search_runs([experiment.experiment_id], parse_qs(address)["searchFilter"][0], max_results=1000)
    return {run.info.run_id for run in page}


def test_an_experiment_of_dvc_leaves_the_runs_of_the_workspace_alone(store, monkeypatch):
    before, stamp = ids(store), STAMP.read_text()
    monkeypatch.setenv("DVC_EXP_NAME", "tried")
    stage("track")
    page = store.search_runs([store.get_experiment_by_name("copying").experiment_id], max_results=1000)
    tried = {run.info.run_id for run in page if run.data.tags["cat.evaluation.by_position"] == "tried"}
    assert len(tried) == len(before)
    assert tried.isdisjoint(before.values())
    assert {run.info.run_name.endswith(" (tried)") for run in page if run.info.run_id in tried} == {True}
    assert best_of_note(store) == tried - {run.info.run_id for run in page if run.data.tags["kind"] != "variant"}
    assert STAMP.read_text() == stamp, "or dvc.lock would name the experiment"
    monkeypatch.delenv("DVC_EXP_NAME")
    stage("track")
    left = {run.info.run_id for run in store.search_runs([page[0].info.experiment_id], max_results=1000)}
    assert left == tried | set(before.values())
    assert best_of_note(store).isdisjoint(tried)
    for run_id in tried:
        store.delete_run(run_id)


def test_a_lost_store_is_rebuilt(store, tmp_path, monkeypatch):
    for name in ("params.yaml", "claims.yaml", "data", "runs", "results", "verdicts", "reports"):
        (shutil.copytree if Path(name).is_dir() else shutil.copy)(name, tmp_path / name)
    names, stamp = set(ids(store)), STAMP.read_text()
    monkeypatch.chdir(tmp_path)
    track()
    assert STAMP.read_text() == stamp, "there are no logs here of when it was trained"
    assert set(ids(client_of(tmp_path))) == names


def track(*arguments):
    """In a process of its own: MLflow takes `sqlite:///mlflow.db` for the same store in every folder that a process was in."""
    subprocess.run([sys.executable, "-m", "pipeline", "track", *arguments], check=True)


def client_of(folder):
    from mlflow.tracking import MlflowClient

    return MlflowClient(f"sqlite:///{folder}/mlflow.db")


@pytest.fixture
def copied(store, tmp_path, monkeypatch):
    """A copy of the tracked study, store and all, is the working folder."""
    copy = shutil.copytree(Path.cwd(), tmp_path / "copy")
    monkeypatch.chdir(copy)
    return copy


def other_answers(variant):
    """Changes the scores of a variant."""
    table = Path("results/copying.csv")
    lines = table.read_text().splitlines()
    wrong = [re.sub(r"[\d.]+$", "0.0625", line) if f",{variant}," in line else line for line in lines]
    assert wrong != lines
    table.write_text("\n".join(wrong) + "\n")


def listed(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def all_have_files(client, folder):
    """Whether the artifacts of every run that has some are within the folder."""
    runs = [*found(client).values(), *found(client, "study").values()]
    return all(
        run.info.artifact_uri.startswith(f"file://{folder}/mlartifacts/") and client.list_artifacts(run.info.run_id)
        for run in runs
    )


def test_a_copied_study_leaves_the_store_of_the_original_alone(store, copied, tracked_folder):
    names, before = set(ids(store)), listed(tracked_folder)
    other_answers("qk")
    track("--prune")
    assert listed(tracked_folder) == before
    client = client_of(copied)
    assert set(ids(client)) == names
    assert older(client) == {}
    assert all_have_files(client, copied)
    gone = set(ids(store).values()) - set(ids(client).values())
    assert len(gone) == 3
    assert gone.isdisjoint(path.name for path in Path("mlartifacts/copying").iterdir())


def test_pruning_deletes_no_folder_outside_of_the_store(copied, tmp_path):
    """Such as that of a run of a task that the study has no longer, in a store that was copied."""
    kept = tmp_path / "kept" / "artifacts"
    kept.mkdir(parents=True)
    track()
    with sqlite3.connect("mlflow.db") as opened:
        opened.execute("update runs set artifact_uri = ? where name = 'qk'", [kept.as_uri()])
    other_answers("qk")
    track("--prune")
    assert older(client_of(copied)) == {}
    assert kept.exists()


def test_a_moved_study_has_its_artifacts_where_it_is_now_and_its_older_studies(copied, tmp_path, monkeypatch):
    other_answers("qk")
    track()
    moved = copied.rename(tmp_path / "moved %20 study")
    monkeypatch.chdir(moved)
    track()
    shutil.copy("mlflow.db", tmp_path)
    client = client_of(tmp_path)
    before = older(client)
    assert set(before) == {"qk", "qk seed 0", "qk seed 1"}
    for run in [*before.values(), *found(client).values(), *found(client, "study").values()]:
        assert run.info.artifact_uri.startswith(f"{moved.as_uri()}/mlartifacts/")
        assert client.list_artifacts(run.info.run_id)


def test_lost_artifacts_are_logged_again(copied):
    track()
    shutil.rmtree("mlartifacts/copying")
    track()
    assert all_have_files(client_of(copied), copied)


def test_a_damaged_store_is_named_in_one_line(copied, capsys):
    Path("mlflow.db").write_bytes(b"not a database" * 100)
    with pytest.raises(SystemExit) as stopped:
        stage("track", "--prune")
    assert stopped.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("track: mlflow.db: file is not a database")


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
    (report,) = found(client, "study").values()
    assert Path(f"mlartifacts/study/{report.info.run_id}/artifacts/report.md").exists()


def test_studies_of_two_folders_share_a_server(store, copied, tracked_folder, tmp_path, monkeypatch):
    from mlflow.tracking import MlflowClient

    server = f"sqlite:///{tmp_path}/server.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    client = MlflowClient(server)
    client.create_experiment("copying", artifact_location=(tmp_path / "copying").as_uri())
    client.create_experiment("study", artifact_location=(tmp_path / "study").as_uri())

    def runs():
        page = client.search_runs([client.get_experiment_by_name("copying").experiment_id], max_results=1000)
        return {run.info.run_id: (run.info.run_name, run.info.status, run.data.tags) for run in page}

    def tags_but_studies(run):
        return run[:2], {name: value for name, value in run[2].items() if name != "studies"}

    monkeypatch.chdir(tracked_folder)
    stage("track")
    unfinished = ids(client)["k seed 0"]
    client.update_run(unfinished, status="RUNNING")
    first = runs()

    monkeypatch.chdir(copied)
    other_answers("qk")
    stage("track", "--prune")
    both = runs()
    for run_id, run in first.items():
        assert tags_but_studies(both[run_id]) == tags_but_studies(run)
    added = {name for run_id, (name, *_) in both.items() if run_id not in first}
    assert added == {"qk", "qk seed 0", "qk seed 1", "k seed 0"}, "what differs, and what is not finished; nothing twice"

    shutil.copy(tracked_folder / "results" / "copying.csv", "results")
    stage("track", "--prune")
    after = runs()
    left = {name for run_id, (name, *_) in after.items() if run_id not in first}
    assert (left, first.keys() - after.keys()) == ({"k seed 0"}, set()), "its own runs are pruned"

    monkeypatch.chdir(tracked_folder)
    stage("track")
    assert unfinished not in runs(), "its own run that is not finished is not left"
    assert {name for name, *_ in runs().values()} == {name for name, *_ in first.values()}


@pytest.mark.parametrize("name", ["it's", "both'and\""])
def test_an_experiment_of_dvc_may_have_quotes_in_its_name(store, monkeypatch, name):
    before = ids(store)
    monkeypatch.setenv("DVC_EXP_NAME", name)
    stage("track")
    stage("track", "--prune")
    page = store.search_runs([store.get_experiment_by_name("copying").experiment_id], max_results=1000)
    tried = {run.info.run_id for run in page} - set(before.values())
    assert len(tried) == len(before)
    assert best_of_note(store) == tried - {run.info.run_id for run in page if run.data.tags["kind"] != "variant"}
    monkeypatch.delenv("DVC_EXP_NAME")
    for run_id in tried:
        store.delete_run(run_id)
    stage("track")


def test_a_server_that_is_not_there_ends_in_one_line(store, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(SystemExit) as stopped:
        stage("track")
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("track: MLflow at http://127.0.0.1:9: ")


def begin_store(*, then=""):
    code = f"from pathlib import Path\nfrom pipeline.tracking.store import _begin_store\n{then}\n_begin_store()"
    return subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)


def test_a_store_whose_making_is_ended_is_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ended = begin_store(then="def ended(self, where): raise KeyboardInterrupt\nPath.replace = ended")
    assert "KeyboardInterrupt" in ended.stderr
    assert Path(".mlflow.db.part/mlflow.db").exists()
    assert not Path("mlflow.db").exists()


def test_what_is_left_of_its_making_is_not_built_upon(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(".mlflow.db.part").mkdir()
    Path(".mlflow.db.part/mlflow.db").write_bytes(b"half of it")
    assert begin_store().returncode == 0
    assert not Path(".mlflow.db.part").exists()
    with sqlite3.connect("mlflow.db") as opened:
        assert opened.execute("select count(*) from runs").fetchone() == (0,)
