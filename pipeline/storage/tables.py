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


CURVES = ("train_loss", "max_loss", "grad_norm", "valid_loss", "valid_accuracy", "max_logit")
"""Columns of a history besides its keys: the fields of cat.training.fit.ValidationRecord."""

RESULTS_COLUMNS = {"task": str, "variant": str, "seed": int, "length": int, "metric": str, "value": float}
FILTER_COLUMNS = {
    "task": str, "variant": str, "seed": int, "layer": int, "projection": str, "head": str, "lag": int, "value": float,
}  # fmt: skip
POSITION_COLUMNS = {
    "task": str, "variant": str, "seed": int, "context": str, "position": int, "tokens": int, "bits_per_byte": float,
}  # fmt: skip
HISTORY_COLUMNS = {"learning_rate": float, "seed": int, "step": int, **dict.fromkeys(CURVES, float)}
COMPARISON_COLUMNS = {
    "claim": str, "task": str, "metric": str, "length": int, "variant": str, "baseline": str, "effect": float, "low": float,
    "high": float, "p_for": float, "p_against": float, "seeds": int, "verdict": str, "reason": str,
}  # fmt: skip
CLAIM_COLUMNS = {
    "claim": str, "statement": str, "source": str, "verdict": str, "reason": str, "effect": float, "low": float, "high": float,
    "p": float, "seeds": int, "comparisons": int, "ablation": str,
}  # fmt: skip
DIAGNOSIS_COLUMNS = {"task": str, "variant": str, "failure_mode": str, "evidence": str}


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of an .npz file by name. Raises ValueError where it is anything else; nothing is ever unpickled."""
    with readable(path, "an .npz file of numbers"):
        if not zipfile.is_zipfile(path) and path.exists():
            raise ValueError("no archive")
        with np.load(path, allow_pickle=False) as file:
            return dict(file)


def read_table(path: Path, columns: Mapping[str, type]) -> pd.DataFrame:
    """A CSV table with these columns, and others perhaps; an empty field of numbers is nan. Raises ValueError otherwise."""
    with readable(path, "a CSV table"):
        return parse_table(path.read_text(encoding="utf-8"), columns)


def parse_table(text: str, columns: Mapping[str, type]) -> pd.DataFrame:
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
