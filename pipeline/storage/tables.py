"""Columns of every CSV table, declared once for writers and readers.

Readers accept a complete table or raise a ValueError of one line that names the file and the fix.
"""

from __future__ import annotations

import io
import math
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
"""Quantities of a training history: the fields of cat.training.fit.ValidationRecord without `step`."""

PRIMARY = {"accuracy": "accuracy", "loss": "bits_per_byte"}
"""Goal of a task -> its primary metric."""

RESULTS_COLUMNS = {"task": str, "variant": str, "seed": int, "length": int, "metric": str, "value": float}
FILTER_COLUMNS = {
    "task": str, "variant": str, "seed": int, "layer": int, "projection": str, "head": str, "lag": int, "value": float,
}  # fmt: skip
REFERENCE_COLUMNS = {"task": str, "reference": str, "length": int, "multiple": float, "metric": str, "value": float}
RATE_COLUMNS = {"task": str, "variant": str, "learning_rate": float, "seed": int, "length": int, "metric": str, "value": float}
HISTORY_COLUMNS = {"learning_rate": float, "seed": int, "step": int, **dict.fromkeys(CURVES, float)}
"""The run, then the fields of cat.training.fit.ValidationRecord."""
COMPARISON_COLUMNS = {
    "claim": str, "task": str, "metric": str, "length": int, "variant": str, "baseline": str, "effect": float, "low": float,
    "high": float, "k": float, "n": float, "baseline_k": float, "baseline_n": float, "p_for": float, "p_against": float,
    "seeds": int, "verdict": str, "reason": str,
}  # fmt: skip
CLAIM_COLUMNS = {
    "claim": str, "statement": str, "source": str, "verdict": str, "reason": str, "effect": float, "low": float, "high": float,
    "p": float, "seeds": int, "comparisons": int, "ablation": str, "test": str, "k": float, "n": float, "baseline_k": float,
    "baseline_n": float, "registered": str, "revised": str,
}  # fmt: skip
_NEWER_CLAIM_COLUMNS = ("test", "k", "n", "baseline_k", "baseline_n", "registered", "revised")
"""Columns that claims.csv has had since 2026-11-30."""
DIAGNOSIS_COLUMNS = {"task": str, "variant": str, "failure_mode": str, "evidence": str}


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Read the arrays of an .npz file by name, never unpickling. Raises ValueError if it is anything else."""
    with readable(path, "an .npz file of numbers"):
        if not zipfile.is_zipfile(path) and path.exists():
            raise ValueError("not a zip archive")
        with np.load(path, allow_pickle=False) as file:
            return dict(file)


def read_table(path: Path, columns: Mapping[str, type]) -> pd.DataFrame:
    """Read a CSV table that has at least `columns`. An empty float field is nan.

    Raises ValueError if a column is missing or a value has another type.
    """
    with readable(path, "a CSV table"):
        return parse_table(path.read_text(encoding="utf-8"), columns)


def parse_verdicts(text: str) -> pd.DataFrame:
    """Parse verdicts/claims.csv. Columns that a table of an older revision lacks are empty."""
    header = text.partition("\n")[0].split(",")
    newer = {name: math.nan if CLAIM_COLUMNS[name] is float else "" for name in _NEWER_CLAIM_COLUMNS if name not in header}
    table = parse_table(text, {name: kind for name, kind in CLAIM_COLUMNS.items() if name not in newer})
    return table.assign(**newer)


def parse_table(text: str, columns: Mapping[str, type]) -> pd.DataFrame:
    """Parse a CSV table as `read_table` does."""
    import pandas as pd

    floats = {name: ["", "nan"] for name, kind in columns.items() if kind is float}
    if not text.endswith("\n"):
        raise ValueError("its last line has no line break")
    # By default pandas would read a variant called `null` or `nan` as a missing value.
    table = pd.read_csv(io.StringIO(text), dtype=dict(columns), keep_default_na=False, na_values=floats)
    if missing := [name for name in columns if name not in table]:
        raise ValueError(f"lacks the column {missing[0]}")
    return table
