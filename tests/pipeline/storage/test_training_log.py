"""The times and commits of trainings come with the results that git and DVC restore."""

import json
import shutil
from pathlib import Path

import pytest

from pipeline.config.grid import Cell
from pipeline.storage import runs
from pipeline.storage.training_log import TABLE, log_path, read_log, write_table

CELLS = [Cell("ar", "none", "first"), Cell("ar", "k", "first")]


def trained(variant, result, seconds):
    folder = runs.folder("ar", variant)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").write_text(result)
    log = {"commit": "abc", "dirty": False, "experiment": None, "started": 1.5e9, "seconds": seconds}
    log_path("ar", variant).parent.mkdir(parents=True, exist_ok=True)
    log_path("ar", variant).write_text(json.dumps({**log, "summary": runs.digest("ar", variant)}))


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for cell in CELLS:
        trained(cell.variant, cell.variant, seconds=0.1)
    write_table(CELLS)


def test_a_restored_result_has_the_log_of_its_training(study):
    local = [read_log("ar", variant) for variant in ("none", "k")]
    shutil.rmtree("logs")
    keys = ("commit", "dirty", "experiment", "started", "seconds")
    assert [[read_log("ar", cell.variant)[key] for key in keys] for cell in CELLS] == [
        [log[key] for key in keys] for log in local
    ]
    before = TABLE.read_bytes()
    write_table(CELLS)
    assert TABLE.read_bytes() == before


def test_training_to_the_same_bits_keeps_the_row_and_another_result_replaces_it(study):
    before = TABLE.read_text().splitlines()
    trained("none", "none", seconds=7.0)
    trained("k", "other", seconds=8.0)
    write_table(CELLS)
    after = TABLE.read_text().splitlines()
    assert before[:2] == after[:2]
    assert ",8.0," in after[2]
    assert read_log("ar", "none")["seconds"] == 7.0, "a log of this folder comes first"


def test_results_of_unknown_origin_have_no_row(study):
    shutil.rmtree("logs")
    Path("runs/ar/k/summary.json").write_text("from elsewhere")
    assert read_log("ar", "k") is None
    write_table(CELLS)
    assert [line.split(",")[1] for line in TABLE.read_text().splitlines()] == ["variant", "none"]
    write_table(CELLS[:0])
    assert len(TABLE.read_text().splitlines()) == 1
