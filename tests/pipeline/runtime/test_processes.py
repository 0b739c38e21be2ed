"""A process that trains keeps the memory that it frees; sockets get a short folder."""

import os
import platform
import subprocess
import sys
import tempfile

import pytest

from pipeline.runtime.processes import short_tmpdir
from tests.helpers.study import ROOT

PAGE_FAULTS = """
import resource, torch
from benchmarks import training
from pipeline.runtime import workers
from pipeline.runtime.processes import keep_memory
{setup}
torch.set_num_threads(1)
training.keep_memory = lambda: None
step = training.project_step(8192, 64, "cpu")
for _ in range(5):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 5)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has mallopt")
@pytest.mark.parametrize("setup", ["keep_memory()", "workers.prepare()"])
def test_a_training_step_reuses_the_memory_of_the_last_one(setup):
    command = [sys.executable, "-c", PAGE_FAULTS.format(setup=setup)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1000  # page faults per step; thousands if memory is returned to the system


def test_only_a_long_temporary_folder_is_replaced(monkeypatch):
    long = "/scratch/" + "ä" * 31  # 71 bytes
    for folder, used in ((long, "/tmp"), (long[:-1], long[:-1])):
        monkeypatch.setattr(tempfile, "tempdir", folder)
        with short_tmpdir(70) as short:
            assert short == tempfile.gettempdir() == used
        assert tempfile.gettempdir() == folder


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such sockets")
def test_workers_start_if_the_temporary_folder_is_long(tmp_path):
    folder = tmp_path / ("x" * 100)
    folder.mkdir()
    code = "from pipeline.scheduling.scheduler import _method; print(_method())"
    environment = {**os.environ, "TMPDIR": str(folder)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("forkserver\n", "")
