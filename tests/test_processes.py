"""A process that computes keeps the memory that it frees."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, torch
from pipeline import compute
from pipeline.processes import keep_memory
{first}
torch.set_num_threads(1)
for round in range(30):
    tensors = [torch.ones(1 << 20) for _ in range(8)]
    del tensors
    if round == 9:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library has no mallopt")
@pytest.mark.parametrize("first", ["keep_memory()", "compute.prepare()"])
def test_what_is_freed_is_taken_again_without_the_system(first):
    ran = subprocess.run([sys.executable, "-c", FAULTS.format(first=first)], capture_output=True, text=True, check=True)
    assert int(ran.stdout) < 1000  # of 20 rounds with 8 tensors of 1,024 pages
