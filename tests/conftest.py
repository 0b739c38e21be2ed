"""Shapes and types of everything that computes with tensors are checked while the tests run."""

import pkgutil
from pathlib import Path

import torch
from jaxtyping import install_import_hook

# pydantic checks its own classes, in which beartype cannot read `Self`.
CHECKED_BY_PYDANTIC = {"configuration", "tasks"}
LIBRARY = Path(__file__).parent.parent / "cat"

torch.set_num_threads(1)  # tests run side by side; more threads than cores would slow them many times

install_import_hook(
    [f"cat.{module.name}" for module in pkgutil.iter_modules([str(LIBRARY)]) if module.name not in CHECKED_BY_PYDANTIC],
    "beartype.beartype",
)
