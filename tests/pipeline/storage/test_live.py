"""The file of a cell in training can be read while it grows, and tells whether its process lives."""

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.storage.live import LiveReader, LiveWriter, is_training, live_paths


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def rows(reader):
    return [{name: value for name, value in row.items() if name != "time"} for row in reader.read()]


def test_a_reader_gets_each_whole_row_once_and_starts_again_with_the_cell():
    writer = LiveWriter("ar", "qk", 10)
    (path,) = live_paths()
    reader = LiveReader(path)
    assert rows(reader) == [{"task": "ar", "variant": "qk", "steps": 10}]
    writer.write({"step": 5})
    with path.open("a") as file:
        file.write('{"step": 7')
    assert rows(reader) == [{"step": 5}]
    with path.open("a") as file:
        file.write("}\n")
    assert rows(reader) == [{"step": 7}]
    writer.end("stopped")
    LiveWriter("ar", "qk", 20).end("trained")
    assert rows(reader) == [{"task": "ar", "variant": "qk", "steps": 20}, {"ended": "trained"}]


def test_a_cell_is_in_training_while_its_process_lives():
    code = (
        "import time\nfrom pipeline.storage.live import LiveWriter\n"
        "writer = LiveWriter('ar', 'qk', 1)\nprint(flush=True)\ntime.sleep(99)"
    )
    program = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    program.stdout.readline()
    (path,) = live_paths()
    assert is_training(path)
    program.kill()
    program.communicate()
    assert not is_training(path)


def test_a_file_that_cannot_be_written_stops_no_training():
    Path("checkpoints").touch()
    writer = LiveWriter("ar", "qk", 1)
    writer.write({"step": 1})
    writer.end("trained")
    assert not live_paths()
