"""`deterministic: true` gives the same bits on CPUs with other instruction sets; without it the bits differ."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline.config.errors import ParamsError
from pipeline.runtime import determinism
from pipeline.runtime.determinism import is_x86
from tests.helpers.study import ROOT, edit, read_params, stage, tiny_study

OTHER_CPU = {"ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
"""Makes PyTorch and MKL compute as on a CPU with fewer instructions."""
needs_newer_cpu = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "NO AVX") or sys.platform != "linux",
    reason="this CPU has only the basic instruction set",
)


STAGES = (("train", "copying", "none"), ("train", "copying", "qk"), ("evaluate", "copying"))


def digests(*more_stages, **environment):
    """Run STAGES and more stages in a new process, and return the digests of all files that they write."""
    for folder in ("runs", "results", "checkpoints", "verdicts", "reports"):
        shutil.rmtree(folder, ignore_errors=True)
    clean = {key: value for key, value in os.environ.items() if key not in OTHER_CPU}
    stages = [*STAGES, *more_stages]
    code = f"from pipeline.cli import main\nfor stage in {stages}: main(stage, standalone_mode=False)"
    command = [sys.executable, "-c", code]
    subprocess.run(command, env={**clean, "PYTHONPATH": str(ROOT), **environment}, check=True, capture_output=True)
    written = [path for folder in ("results", "verdicts", "reports") for path in Path(folder).rglob("*") if path.is_file()]
    files = [*Path("runs").rglob("*.safetensors"), *Path("runs").rglob("history.csv"), *written]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_study(tmp_path, tasks=["copying"])
    variants = {name: read_params()["variants"][name] for name in ("none", "qk")}
    ablation = {"question": "?", "tasks": ["copying"], "variants": list(variants), "plot": "lines"}
    edit(variants=variants, ablations={"qkv_subsets": ablation})
    Path("dvc.yaml").unlink()
    stage("plan")
    stage("generate", "copying")


@needs_newer_cpu
def test_bits_depend_on_the_cpu_unless_deterministic(study):
    assert digests() != digests(**OTHER_CPU)
    edit(deterministic=True)
    assert digests() == digests(**OTHER_CPU)


def test_time_zone_locale_hash_seed_and_parallel_runs_change_nothing(study):
    more_stages = (("judge",), ("render",))
    expected = digests(*more_stages, TZ="UTC")
    other_environment = {"TZ": "Asia/Kolkata", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "3"}
    edit(parallel_runs=2)
    assert {"reports/figures/qkv_subsets.svg", "verdicts/claims.csv", "results/copying.csv"} <= expected.keys()
    assert digests(*more_stages, **other_environment) == expected


def test_the_environment_must_be_set_before_torch_is_imported(study):
    edit(deterministic=True)
    with pytest.raises(RuntimeError, match="before the deterministic environment"):
        stage("train", "copying", "none")


@pytest.mark.skipif(not is_x86(), reason="not an x86-64 CPU")
def test_a_cpu_without_avx2_is_refused(monkeypatch, tmp_path):
    (tmp_path / "cpuinfo").write_text("flags : fpu sse2 avx\n")
    monkeypatch.setattr(determinism, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.delitem(sys.modules, "torch")
    with pytest.raises(ParamsError, match="this CPU has no AVX2"):
        determinism.set_deterministic_env(True)
    assert determinism.MARK not in os.environ
