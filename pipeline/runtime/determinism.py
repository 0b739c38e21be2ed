"""`deterministic: true`: make the last bits independent of the CPU, as far as PyTorch's libraries allow.

PyTorch's kernels, MKL and oneDNN choose code by the instruction set of the CPU. The environment restricts all three to what
every x86-64 CPU has; MKL then adds in the same order everywhere. On a GPU, PyTorch uses algorithms that repeat to the bit if it
has them; different kinds of GPU still give different results. The environment must be set before torch is imported.
"""

from __future__ import annotations

import os
import sys

DETERMINISTIC_ENV = {
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
}
MARK = "CAT_DETERMINISTIC"
"""Environment variable that tells child processes to be deterministic."""


def set_deterministic_env(deterministic: bool) -> None:
    """Set the environment of this process and its children. Raises RuntimeError if torch is already imported."""
    if not deterministic or MARK in os.environ:
        return
    if "torch" in sys.modules:
        raise RuntimeError("torch was imported before the deterministic environment was set")
    os.environ.update(DETERMINISTIC_ENV, **{MARK: "1"})


def apply_determinism() -> None:
    """Make torch deterministic in this process if the environment says so."""
    if MARK in os.environ:
        import torch

        torch.use_deterministic_algorithms(True, warn_only=True)
