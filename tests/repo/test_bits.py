"""With `deterministic: true`, every x86-64 machine computes the committed bits; the label of results names the CPU.

After a change that is meant to change results, or of PyTorch, copy the digests of the failing test into bits.json.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline.runtime import devices
from pipeline.runtime.determinism import DETERMINISTIC_ENV, MARK
from tests.helpers.study import ROOT, edit, tiny_study

COMMITTED = json.loads((ROOT / "tests" / "repo" / "bits.json").read_text(encoding="utf-8"))
"""`torch`: the version; `digests`: file of the study -> sha256."""
TASK = {
    "data": {
        "kind": "copying", "signals": 3, "alphabet": 8, "noise": 4, "unique": True, "length": 16, "multiples": [1, 2],
        "train_examples": 64, "valid_examples": 16, "test_examples": 16,
    },
}  # fmt: skip
DEFAULTS = {
    "width": 16, "layers": 1, "heads": 2, "training": {
        "steps": 5, "batch": 16, "learning_rates": [0.01], "seeds": [0], "weight_decay": 0.01, "grad_clip": 1.0, "warmup": 0.1,
        "eval_every": 1, "early_stop_accuracy": 1.0, "early_stop_patience": 5,
    },
}  # fmt: skip
VARIANTS = {
    "qk": {"mixer": "attention", "position": "rotary", "qk_norm": True, "conv_q": 3, "conv_k": "full"},
    "delta": {"mixer": "delta", "conv_k": 3, "gate": True},
    "mamba": {"mixer": "mamba"},
}
STAGES = """\
from pipeline.runtime.determinism import set_deterministic_env
set_deterministic_env(True)
from tests.helpers.study import stage
stage("plan")
stage("generate", "copying")
for variant in VARIANTS:
    stage("train", "copying", variant)
stage("evaluate", "copying")
"""
OTHER_CPU = {
    "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX512F,-AVX2,-FMA",
    "NPY_DISABLE_CPU_FEATURES": "X86_V4 AVX512_ICL AVX512_SPR",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}
"""Makes the C library, NumPy and MKL compute as on a CPU with fewer instructions."""
CPU = torch.device("cpu")

only_x86 = pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="not an x86-64 CPU")
only_locked_torch = pytest.mark.skipif(
    importlib.metadata.version("torch").partition("+")[0] != COMMITTED["torch"], reason=f"not PyTorch {COMMITTED['torch']}"
)


def digests(folder, **environment):
    """Run a tiny deterministic study in a process of its own; digest its training curves and results."""
    clean = {key: value for key, value in os.environ.items() if key not in {MARK, *DETERMINISTIC_ENV, *OTHER_CPU}}
    command = [sys.executable, "-c", f"VARIANTS = {[*VARIANTS]}\n{STAGES}"]
    environment = {**clean, "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    files = [*folder.glob("runs/*/*/history.csv"), *folder.glob("results/*.csv")]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)}


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_study(tmp_path, tasks=["copying"])
    ablation = {"question": "?", "tasks": ["copying"], "variants": [*VARIANTS], "plot": "lines"}
    edit(defaults=DEFAULTS, tasks={"copying": TASK}, variants=VARIANTS, ablations={"copying": ablation}, deterministic=True)
    Path("dvc.yaml").unlink()
    return tmp_path


@only_x86
@only_locked_torch
def test_a_deterministic_study_has_the_committed_bits(tiny):
    assert digests(tiny) == COMMITTED["digests"], f"other bits on {devices.cpu_model()}"


@only_x86
@pytest.mark.skipif(sys.platform != "linux", reason="only glibc can hide instructions of the CPU")
@pytest.mark.long
def test_instructions_that_libraries_find_change_no_bit(tiny):
    assert digests(tiny, **OTHER_CPU) == COMMITTED["digests"]


@pytest.mark.parametrize(
    ("cpuinfo", "name"),
    [
        ("vendor_id\t: GenuineIntel\nmodel name\t: Intel(R) Xeon(R) Processor\n", "Intel Xeon Processor"),
        ("vendor_id : GenuineIntel\nmodel name : Intel(R) Core(TM) i7-9750H CPU @ 2.60GHz\n", "Intel Core i7-9750H"),
        ("vendor_id : GenuineIntel\nmodel name : Intel(R) Pentium(R) 4 CPU  3.00GHz\n", "Intel Pentium 4"),
        (
            "vendor_id : AuthenticAMD\nmodel name : AMD EPYC 9B14 96-Core Processor\n\nmodel name : b\n",
            "AMD EPYC 9B14 96-Core Processor",
        ),
        ("vendor_id : AuthenticAMD\nmodel name : QEMU Virtual CPU version 2.5+\n", "AMD QEMU Virtual CPU version 2.5+"),
        ("vendor_id : AuthenticAMD\ncpu family : 25\nmodel : 17\nmodel name : unknown\n", "AMD family 25 model 17"),
        ("vendor_id : made up\nmodel name : X | `1`\n", "X 1"),
        ("processor : 0\nCPU implementer : 0x41\nCPU part : 0xd0c\n", "implementer 0x41 part 0xd0c"),
        ("", platform.machine()),
        (b"\xff\0", platform.machine()),
        (None, platform.machine()),
    ],
)
def test_the_label_names_maker_and_model_of_the_cpu(tmp_path, monkeypatch, cpuinfo, name):
    path = tmp_path / "cpuinfo"
    if cpuinfo is None:
        path.mkdir()  # cannot be read
    else:
        path.write_bytes(cpuinfo if isinstance(cpuinfo, bytes) else cpuinfo.encode())
    monkeypatch.setattr(devices, "CPUINFO", path)
    monkeypatch.setattr(devices.sys, "platform", "linux")
    monkeypatch.delenv(MARK, raising=False)
    devices.cpu_model.cache_clear()
    try:
        label = devices.made_on(CPU, 2)
    finally:
        devices.cpu_model.cache_clear()
    assert label == f"2 x CPU ({name}, {torch.backends.cpu.get_cpu_capability()}), PyTorch {torch.__version__.partition('+')[0]}"


def test_other_systems_name_the_cpu_too(tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "CPUINFO", tmp_path / "none")
    for processor, name in (("Intel64 Family 6, GenuineIntel", "Intel64 Family 6 GenuineIntel"), ("", platform.machine())):
        monkeypatch.setattr(platform, "processor", lambda processor=processor: processor)
        monkeypatch.setattr(devices.sys, "platform", "win32")
        assert devices.cpu_model.__wrapped__() == name
    monkeypatch.setattr(devices.sys, "platform", "darwin")

    def run(*_, **__):
        raise FileNotFoundError

    monkeypatch.setattr(devices.subprocess, "run", run)
    assert devices.cpu_model.__wrapped__() == platform.machine()


@pytest.mark.parametrize(
    ("machine", "label"),
    [("x86_64", "deterministic"), ("AMD64", "deterministic"), ("arm64", "deterministic, arm64")],
)
def test_a_deterministic_label_names_no_model(monkeypatch, machine, label):
    monkeypatch.setenv(MARK, "1")
    monkeypatch.setattr(platform, "machine", lambda: machine)
    assert devices.describe(CPU) == f"CPU ({label})"
