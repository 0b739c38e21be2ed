"""`deterministic: true`: make the last bits independent of the CPU, as far as PyTorch's libraries allow.

PyTorch's kernels, MKL and oneDNN choose code by the instruction set of the CPU. The environment fixes the choice. PyTorch's own
kernels use AVX2, which is therefore required. MKL and oneDNN use what every x86-64 CPU has; MKL then adds in the same order
everywhere. On a GPU, PyTorch uses algorithms that repeat to the bit if it has them; different kinds of GPU still give different
results. The environment must be set before torch is imported.
"""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

from pipeline.config.errors import ParamsError

CPUINFO = Path("/proc/cpuinfo")
DETERMINISTIC_ENV = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_CBWR": "COMPATIBLE",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
}
MARK = "CAT_DETERMINISTIC"
"""Environment variable that tells child processes to be deterministic."""


def set_deterministic_env(deterministic: bool) -> None:
    """Set the environment of this process and its children.

    Raises RuntimeError if torch is already imported, and ParamsError on an x86-64 CPU without AVX2.
    """
    if not deterministic or MARK in os.environ:
        return
    if "torch" in sys.modules:
        raise RuntimeError("torch was imported before the deterministic environment was set")
    if is_x86() and CPUINFO.exists() and "avx2" not in CPUINFO.read_text().split():
        raise ParamsError(["params.yaml: deterministic = true: this CPU has no AVX2. Fix: deterministic: false"])
    os.environ.update(DETERMINISTIC_ENV, **{MARK: "1"})
    if not is_x86():
        del os.environ["ATEN_CPU_CAPABILITY"]  # PyTorch has one kind of code there


def is_x86() -> bool:
    """Whether this is an x86-64 CPU."""
    return platform.machine().lower() in ("x86_64", "amd64")


def apply_determinism() -> None:
    """Make torch deterministic in this process if the environment says so."""
    if MARK in os.environ:
        import torch

        torch.use_deterministic_algorithms(True, warn_only=True)
        # Filling only helps to find bugs, and costs time.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
