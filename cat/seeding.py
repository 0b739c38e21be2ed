"""Seeds and NumPy generators, derived from their purpose."""

from __future__ import annotations

import hashlib

import numpy as np


def derive_seed(seed: int, name: str, use: str) -> int:
    """Derive a 63-bit seed from a seed, the name of a task and a use; seeds of different uses are independent."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}/{use}".encode()).digest()[:8], "little") >> 1


def generator(seed: int, name: str, split: str) -> np.random.Generator:
    """Create the generator of (seed, name, split). It does not depend on any other random draw."""
    return np.random.Generator(np.random.PCG64(derive_seed(seed, name, split)))
