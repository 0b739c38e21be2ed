"""`deterministic: true` gives the same bits on CPUs with other instructions; without it they differ, or this shows nothing."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers.study import ROOT, edit, read_params, stage, tiny_study

OTHER_CPU = {"ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
"""As PyTorch and MKL compute on a machine that lacks what this one has."""
several_kinds = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "NO AVX") or sys.platform != "linux",
    reason="this CPU has nothing that another one could lack",
)


STAGES = (("train", "copying", "none"), ("train", "copying", "qk"), ("evaluate", "copying"))


def digests(*more, **environment):
    """Of all that stages write of what is trained, evaluated, and what `more` of them make of it, each in its own process."""
    for folder in ("runs", "results", "checkpoints", "verdicts", "reports"):
        shutil.rmtree(folder, ignore_errors=True)
    clean = {key: value for key, value in os.environ.items() if key not in OTHER_CPU}
    for arguments in (*STAGES, *more):
        command = [sys.executable, "-m", "pipeline", *arguments]
        subprocess.run(command, env={**clean, "PYTHONPATH": str(ROOT), **environment}, check=True, capture_output=True)
    written = [path for folder in ("results", "verdicts", "reports") for path in Path(folder).rglob("*") if path.is_file()]
    files = [*Path("runs").rglob("*.safetensors"), *Path("runs").rglob("history.csv"), *written]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_study(tmp_path, tasks=["copying"])
    lines = {name: read_params()["variants"][name] for name in ("none", "qk")}
    question = {"question": "?", "tasks": ["copying"], "variants": list(lines), "figure": "lines"}
    edit(variants=lines, ablations={"streams": question})
    Path("dvc.yaml").unlink()
    stage("plan")
    stage("generate", "copying")


@several_kinds
def test_bits_depend_on_the_kind_of_cpu_unless_they_are_pinned(study):
    assert digests() != digests(**OTHER_CPU)
    edit(deterministic=True)
    assert digests() == digests(**OTHER_CPU)


def test_time_zone_locale_hashes_and_threads_change_nothing(study):
    more = (("judge",), ("render",))
    here = digests(*more, TZ="UTC")
    elsewhere = {"TZ": "Asia/Kolkata", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "3"}
    edit(threads=2)
    assert {"reports/svg/streams.svg", "verdicts/claims.csv", "results/copying.csv"} <= here.keys()
    assert digests(*more, **elsewhere) == here


def test_pinning_comes_too_late_once_torch_is_there(study):
    edit(deterministic=True)
    with pytest.raises(RuntimeError, match="before it was pinned"):
        stage("train", "copying", "none")
