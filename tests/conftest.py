"""Shapes and types of everything that computes with tensors are checked while the tests run."""

import pkgutil
from pathlib import Path

from jaxtyping import install_import_hook

# pydantic checks its own classes, in which beartype cannot read `Self`.
CHECKED_BY_PYDANTIC = {"configuration", "tasks"}
LIBRARY = Path(__file__).parent.parent / "cat"

install_import_hook(
    [f"cat.{module.name}" for module in pkgutil.iter_modules([str(LIBRARY)]) if module.name not in CHECKED_BY_PYDANTIC],
    "beartype.beartype",
)
