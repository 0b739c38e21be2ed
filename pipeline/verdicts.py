"""The verdicts as a table, for the report, the README and the terminal."""

from __future__ import annotations

import math

import pandas as pd

from pipeline.files import VERDICTS


def read_verdicts() -> pd.DataFrame:
    """A row a claim, none where there are no claims. Raises ValueError where the study was not judged."""
    path = VERDICTS / "claims.csv"
    try:
        return pd.read_csv(path, keep_default_na=False, na_values={name: [""] for name in ("effect", "low", "high", "p")})
    except FileNotFoundError:
        raise ValueError(f"{path}: is missing; run `dvc repro judge`") from None
    except pd.errors.EmptyDataError:
        return pd.DataFrame(columns=["claim", "says", "verdict"])


def verdict_table(verdicts: pd.DataFrame) -> pd.DataFrame:
    """Claim, verdict, effect with its interval, p and the comparison that decided, as text."""
    rows = [
        {
            "claim": f"{row.says} ({row.source})",
            "verdict": f"**{row.verdict}**",
            "effect (95 % interval)": "-" if math.isnan(row.effect) else f"{row.effect:+.3f} ({row.low:+.3f} to {row.high:+.3f})",
            "p": "-" if math.isnan(row.p) else "<.001" if row.p < 0.001 else f"{row.p:.3f}",
            "decided by": row.reason,
        }
        for row in verdicts.itertuples()
    ]
    return pd.DataFrame(rows, columns=["claim", "verdict", "effect (95 % interval)", "p", "decided by"])
