"""The MLflow store follows the files: complete, without doubles, rebuilt when lost, and apart for experiments."""

import shutil
from pathlib import Path

import pytest

from pipeline import params
from pipeline.grid import cells
from tests.study import edit, finished_study, stage


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
    page = client.search_runs([client.get_experiment_by_name(experiment).experiment_id], max_results=1000)
    runs = {run.info.run_name: run for run in page}
    assert len(runs) == len(page)
    return runs


def ids(client):
    return {name: run.info.run_id for name, run in found(client).items()}


def test_there_is_a_run_for_every_variant_and_seed(store):
    study = params.load()
    runs = found(store)
    assert set(runs) == {f"{cell.variant} seed {seed}" for cell in cells(study) for seed in study.seeds}
    assert len({frozenset(run.data.params) for run in runs.values()}) == 1, "every run has the same parameter keys"
    run = runs["qk seed 1"]
    assert run.info.status == "FINISHED"
    assert {k: run.data.params[k] for k in ("variant", "seed", "model.q", "model.k", "model.v", "model.qk_norm")} == {
        "variant": "qk", "seed": "1", "model.q": "3", "model.k": "3", "model.v": "-", "model.qk_norm": "true",
    }  # fmt: skip
    assert {"task", "variant", "seed", "data_digest", "device", "ablations"} <= set(run.data.tags)
    lengths = {metric.step for metric in store.get_metric_history(run.info.run_id, "test/accuracy")}
    assert lengths == set(study.tasks["copying"].data.lengths)
    assert [m.step for m in store.get_metric_history(run.info.run_id, "valid/loss")] == [5]
    (dataset,) = run.inputs.dataset_inputs
    assert dataset.dataset.name == "copying"
    assert dataset.dataset.digest == run.data.tags["data_digest"]
    assert {item.path for item in store.list_artifacts(run.info.run_id)} == {"history.csv", "summary.json", "weights"}
    assert [item.path for item in store.list_artifacts(run.info.run_id, "weights")] == ["weights/seed_1.safetensors"]
    (report,) = found(store, "study").values()
    there = {item.path for item in store.list_artifacts(report.info.run_id)}
    assert there == {"claims.yaml", "figures", "params.yaml", "svg", "tables"}


def test_repeating_changes_nothing(store):
    before = ids(store)
    stage("track")
    assert ids(store) == before


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
    assert {name for name in before if changed[name] != before[name]} == {"qk seed 0", "qk seed 1"}
    edit(**{"variants.qk.k": 3})
    for folder in ("runs", "results"):
        shutil.rmtree(folder)
        Path(f"kept_{folder}").rename(folder)
    stage("track")
    assert {name for name, key in ids(store).items() if key != before[name]} == {"qk seed 0", "qk seed 1"}


def test_an_experiment_of_dvc_leaves_the_runs_of_the_workspace_alone(store, monkeypatch):
    before = ids(store)
    monkeypatch.setenv("DVC_EXP_NAME", "tried")
    stage("track")
    page = store.search_runs([store.get_experiment_by_name("copying").experiment_id], max_results=1000)
    tried = {run.info.run_id for run in page if run.data.tags["cat.context"] == "tried"}
    assert len(tried) == len(before)
    assert tried.isdisjoint(before.values())
    monkeypatch.delenv("DVC_EXP_NAME")
    stage("track")
    left = {run.info.run_id for run in store.search_runs([page[0].info.experiment_id], max_results=1000)}
    assert left == tried | set(before.values())
    for run_id in tried:
        store.delete_run(run_id)


def test_a_lost_store_is_rebuilt(store, tmp_path, monkeypatch):
    for name in ("params.yaml", "claims.yaml", "data", "runs", "results", "verdicts", "reports"):
        (shutil.copytree if Path(name).is_dir() else shutil.copy)(name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    names = set(ids(store))
    stage("track")
    from mlflow.tracking import MlflowClient

    assert set(ids(MlflowClient("sqlite:///mlflow.db"))) == names


def test_a_server_that_is_not_there_ends_in_one_line(store, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(SystemExit) as stopped:
        stage("track")
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("track: MLflow at http://127.0.0.1:9: ")
