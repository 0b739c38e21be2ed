"""A run in training is in MLflow while it trains; a killed one ends, and a dead server delays nothing."""

import sys

import pytest

from pipeline.config.load import load_study
from pipeline.storage.live import LiveWriter
from pipeline.tracking import live, store, sync, training_runs
from pipeline.tracking.live import forward
from tests.helpers.study import ROOT, tiny_study

COLUMNS = {"valid_loss": 3.0, "valid_accuracy": 0.25, "max_loss": 2.0, "grad_norm": 1.0, "max_logit": None}


def row(step, **changes):
    return {"learning_rate": 0.005, "seed": 0, "step": step, "schedule": 0.001, "train_loss": 1.0 / step, **COLUMNS, **changes}


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # MLflow caches stores by their address, so each test has its own.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setattr(store, "tracking_uri", lambda: f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setattr(sync, "tracking_uri", lambda: f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.delenv("DVC_EXP_NAME", raising=False)
    tiny_study(tmp_path, tasks=["copying"])
    return load_study()


def steps(*changes):
    """A `wait` that makes one change per call; after the last, it is over."""
    left = list(changes)

    def wait(seconds):
        left.pop(0)()
        return not left

    return wait


def live_runs(study):
    client, pages, _ = sync.connect(study)
    return client, training_runs.live_runs(client, pages)


def test_a_run_in_training_is_running_with_its_curves_and_ends_with_its_cell(study):
    writer = LiveWriter("copying", "qk", 100)
    seen = []

    def look():
        client, runs = live_runs(study)
        seen.append([(run.info.status, client.get_metric_history(run.info.run_id, "train/loss")) for run in runs])

    def write(*rows):
        for item in rows:
            writer.write(item)

    forward(study, steps(lambda: write(row(5), row(10)), look, lambda: write(row(15)), look, lambda: writer.end("trained")))
    assert [[(status, [m.step for m in history]) for status, history in item] for item in seen] == [
        [("RUNNING", [5, 10])],
        [("RUNNING", [5, 10, 15])],
    ]
    _, (run,) = live_runs(study)
    assert run.info.status == "FINISHED"
    assert {"train/loss", "train/grad_norm", "train/learning_rate", "valid/accuracy"} <= set(run.data.metrics)
    assert any(name.startswith("system/cpu") for name in run.data.metrics)
    assert (run.data.params["learning_rate"], run.data.params["seed"]) == ("0.005", "0")

    again = LiveWriter("copying", "qk", 100)
    forward(study, steps(lambda: again.write(row(5)), lambda: again.end("failed")))
    _, (run,) = live_runs(study)
    assert (run.info.status, run.data.metrics["train/loss"]) == ("FAILED", 0.2), "in place of the earlier run"


def test_a_killed_training_leaves_no_running_run(study):
    writer = LiveWriter("copying", "qk", 100)
    writer.write(row(5))
    forward(study, steps(lambda: None, lambda: None))
    client, (run,) = live_runs(study)
    assert run.info.status == "KILLED", "its reader ended and the file has no end"
    client.update_run(run.info.run_id, status="RUNNING")  # the state after a kill
    list(sync.addresses(study, ""))
    assert client.get_run(run.info.run_id).info.status == "RUNNING", "the cell is still in training"
    writer.lock.release()
    writer.file.close()
    list(sync.addresses(study, ""))
    assert client.get_run(run.info.run_id).info.status == "KILLED"
    client.update_run(run.info.run_id, status="RUNNING")
    forward(study, steps(lambda: None))
    assert client.get_run(run.info.run_id).info.status == "KILLED", "the next forwarder ends it, too"


def test_rows_wait_for_a_server_that_does_not_answer(study, monkeypatch, capsys):
    from mlflow.tracking import MlflowClient

    writer, original, pauses = LiveWriter("copying", "qk", 100), MlflowClient.log_batch, []

    def refuse(*arguments, **options):
        raise OSError("no answer")

    def dies():
        writer.write(row(5))
        monkeypatch.setattr(MlflowClient, "log_batch", refuse)

    def returns():
        monkeypatch.setattr(MlflowClient, "log_batch", original)

    wait = steps(dies, lambda: writer.write(row(10)), returns, lambda: None, lambda: writer.end("trained"))

    def recorded(seconds):
        pauses.append(seconds)
        return wait(seconds)

    forward(study, recorded)
    client, (run,) = live_runs(study)
    assert [m.step for m in client.get_metric_history(run.info.run_id, "train/loss")] == [5, 10]
    assert pauses == [3.0, 6.0, 12.0, 3.0, 3.0]
    assert capsys.readouterr().out.splitlines() == ["no answer", "no answer"]


def test_the_process_ends_with_the_training_whatever_the_server_does(tmp_path, monkeypatch):
    """Nothing listens at the address; the end does not wait for it."""
    monkeypatch.chdir(tmp_path)
    tiny_study(tmp_path, tasks=["copying"])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    process = live.start()
    live.end(process)
    assert process.poll() is not None
    assert live.LOG.exists()
    monkeypatch.setattr(sys, "executable", "/nothing")
    assert live.start() is None
