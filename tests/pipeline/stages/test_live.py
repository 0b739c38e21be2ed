"""A cell in training writes its records, and how it ended, unless params.yaml says otherwise."""

from types import SimpleNamespace

import pytest

from cat.training.fit import lr_scale, validation_record
from pipeline.stages import live
from pipeline.stages.live import LiveFiles
from pipeline.stages.train import Job
from pipeline.storage.live import LiveReader, live_paths

TRAINING = SimpleNamespace(steps=10, warmup=0.5)
CELL = SimpleNamespace(task="ar", variant="qk", setting=SimpleNamespace(training=TRAINING))
RECORDS = {Job(0.01, 1): validation_record(4, [2.0], [1.0], 3.0, 0.25, None)}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def rows():
    return [row for path in live_paths() for row in LiveReader(path).read()]


def test_a_record_has_its_run_and_the_learning_rate_of_its_step():
    with LiveFiles(enabled=True, delay=60) as files:
        files.advance(CELL, RECORDS)
    _, row, last = rows()
    assert (row["seed"], row["step"], row["train_loss"], row["valid_accuracy"]) == (1, 4, 2.0, 0.25)
    assert row["schedule"] == 0.01 * lr_scale(4, 10, 0.5)
    assert last["ended"] == "trained"


@pytest.mark.parametrize(("error", "how"), [(ValueError, "failed"), (KeyboardInterrupt, "stopped")])
def test_a_cell_ends_as_its_block(error, how):
    with LiveFiles(enabled=True, delay=60) as files:
        files.advance(CELL, RECORDS)
        files.__exit__(error, error(), None)
    assert rows()[-1]["ended"] == how


def test_the_other_runs_of_a_failed_cell_do_not_start_it_again():
    with LiveFiles(enabled=True, delay=60) as files:
        files.advance(CELL, RECORDS)
        files.end(CELL, "failed")
        files.advance(CELL, RECORDS)
    assert [row.get("ended") for row in rows()] == [None, None, "failed"]


def test_without_live_there_is_no_file():
    with LiveFiles(enabled=False, delay=0) as files:
        files.advance(CELL, RECORDS)
    assert not live_paths()


def test_a_long_training_is_shown_in_mlflow_once(monkeypatch):
    calls = []
    monkeypatch.setattr(live.live, "start", lambda: calls.append("start") or "process")
    monkeypatch.setattr(live.live, "end", calls.append)
    for delay, expected in ((60, []), (0, ["start", "process"])):
        with LiveFiles(enabled=True, delay=delay) as files:
            files.advance(CELL, RECORDS)
            files.advance(CELL, RECORDS)
        assert calls == expected
