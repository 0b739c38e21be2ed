"""`deterministic: true` gives the same bits on CPUs with other instructions; without it they differ, or this shows nothing."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.study import ROOT, edit, read_params, stage, tiny_study

OTHER_CPU = {"ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
"""As PyTorch and MKL compute on a machine that lacks what this one has."""
pytestmark = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "NO AVX") or sys.platform != "linux",
    reason="this CPU has nothing that another one could lack",
)


def digests(**environment):
    """Of weights, history and scores, trained and evaluated in a process of its own."""
    for folder in ("runs", "results", "checkpoints"):
        shutil.rmtree(folder, ignore_errors=True)
    clean = {key: value for key, value in os.environ.items() if key not in OTHER_CPU}
    for arguments in (("train", "copying", "none"), ("train", "copying", "qk"), ("evaluate", "copying")):
        command = [sys.executable, "-m", "pipeline", *arguments]
        subprocess.run(command, env={**clean, "PYTHONPATH": str(ROOT), **environment}, check=True, capture_output=True)
    files = [*Path("runs").rglob("*.safetensors"), *Path("runs").rglob("history.csv"), Path("results/copying.csv")]
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


def test_bits_depend_on_the_kind_of_cpu_unless_they_are_pinned(study):
    assert digests() != digests(**OTHER_CPU)
    edit(deterministic=True)
    assert digests() == digests(**OTHER_CPU)


def test_pinning_comes_too_late_once_torch_is_there(study):
    edit(deterministic=True)
    with pytest.raises(RuntimeError, match="before it was pinned"):
        stage("train", "copying", "none")
