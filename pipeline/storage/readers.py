"""What another stage has written, read back: whole, or refused in one line that names the file and what to run."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.storage.files import readable

if TYPE_CHECKING:
    import pandas as pd


def arrays(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of an .npz file by name. Raises ValueError where it is anything else; nothing is ever unpickled."""
    with readable(path, "an .npz file of numbers"):
        if not zipfile.is_zipfile(path) and path.exists():
            raise ValueError("no archive")
        with np.load(path, allow_pickle=False) as file:
            return dict(file)


def table(path: Path, columns: Mapping[str, type]) -> pd.DataFrame:
    """A CSV table with these columns, and others perhaps; an empty field of numbers is nan. Raises ValueError otherwise."""
    with readable(path, "a CSV table"):
        return parsed(path.read_text(encoding="utf-8"), columns)


def parsed(text: str, columns: Mapping[str, type]) -> pd.DataFrame:
    """The table that a text is. Raises ValueError where it has not these columns, or another kind of value in them."""
    import pandas as pd

    floats = {name: ["", "nan"] for name, kind in columns.items() if kind is float}
    if not text.endswith("\n"):
        raise ValueError("its last line has no end")
    # By default a variant called `null` or `nan` would be no text but a gap.
    found = pd.read_csv(io.StringIO(text), dtype=dict(columns), keep_default_na=False, na_values=floats)
    if missing := [name for name in columns if name not in found]:
        raise ValueError(f"lacks the column {missing[0]}")
    return found
