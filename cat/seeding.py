"""Seeds and NumPy generators, each derived from what it is for."""

from __future__ import annotations

import hashlib

import numpy as np


def derive_seed(seed: int, name: str, use: str) -> int:
    """A 63-bit seed for one use of one seed of one task, independent of every other."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}/{use}".encode()).digest()[:8], "little") >> 1


def generator(seed: int, name: str, split: str) -> np.random.Generator:
    """The stream of (seed, name, split): the same whatever else is drawn."""
    return np.random.Generator(np.random.PCG64(derive_seed(seed, name, split)))
