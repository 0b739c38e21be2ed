"""`deterministic: true`: last bits that do not depend on the instructions that a CPU has, as far as PyTorch's libraries allow.

What they would choose by the CPU is pinned to what every x86-64 CPU has: PyTorch's own kernels, MKL's (which then add in one
order on all of them) and oneDNN's. On a GPU, algorithms that repeat to the bit are used where PyTorch has them; results of
different kinds of GPU differ all the same. All of it must be in the environment before torch is imported.
"""

from __future__ import annotations

import os
import sys

PINS = {
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
}
MARK = "CAT_DETERMINISTIC"
"""Tells the processes that this one starts."""


def set_deterministic_env(deterministic: bool) -> None:
    """For this process and those that it starts. Raises RuntimeError where torch is imported already and would not be pinned."""
    if not deterministic or MARK in os.environ:
        return
    if "torch" in sys.modules:
        raise RuntimeError("torch was imported before it was pinned")
    os.environ.update(PINS, **{MARK: "1"})


def apply_determinism() -> None:
    """What is set in torch itself; of every process that computes."""
    if MARK in os.environ:
        import torch

        torch.use_deterministic_algorithms(True, warn_only=True)
