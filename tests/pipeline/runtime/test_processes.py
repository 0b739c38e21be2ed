"""A process that computes keeps the memory that it frees."""

import platform
import subprocess
import sys

import pytest

from tests.helpers.study import ROOT

FAULTS = """
import resource, torch
from benchmarks import training
from pipeline.runtime import workers
from pipeline.runtime.processes import keep_memory
{first}
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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library has no mallopt")
@pytest.mark.parametrize("first", ["keep_memory()", "compute.prepare()"])
def test_a_training_step_takes_what_the_last_one_freed(first):
    command = [sys.executable, "-c", FAULTS.format(first=first)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(ran.stdout) < 1000  # pages; thousands where they are given back
