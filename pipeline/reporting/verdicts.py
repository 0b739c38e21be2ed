"""The verdicts as a table, for the report, the README and the terminal."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from pipeline.config.claims import COUNT_TESTS, SHARE_TESTS
from pipeline.reporting.markdown import escape
from pipeline.storage.files import readable
from pipeline.storage.paths import VERDICTS
from pipeline.storage.tables import parse_verdicts, read_table

ABSENT = "the study has no"
"""Start of the reason of a claim that is undecided because the study does not train its variants."""
FEW = 5
"""Claims that a sentence lists by name at most."""
VALUES = ("supported", "contradicted", "undecided")


def read_verdicts() -> pd.DataFrame:
    """One row per claim. Raises ValueError if the study has not been judged."""
    path = VERDICTS / "claims.csv"
    with readable(path, "a CSV table"):
        table = parse_verdicts(path.read_text(encoding="utf-8"))
    if len(strange := table.loc[~table["verdict"].isin(VALUES), "verdict"]):
        raise ValueError(f"{path}: {strange.iloc[0]!r} is not {' or '.join(VALUES)}. Fix: run `dvc repro judge`")
    return table


def of_the_study(verdicts: pd.DataFrame) -> pd.DataFrame:
    """The claims whose tasks, variants and lengths are part of the study."""
    return verdicts[~verdicts["reason"].str.startswith(ABSENT)]


def left_out(verdicts: pd.DataFrame) -> str:
    """A sentence about the claims that `of_the_study` leaves out, or an empty string."""
    names = list(verdicts["claim"][verdicts["reason"].str.startswith(ABSENT)])
    if not names:
        return ""
    which = f" ({', '.join(names)})" if len(names) <= FEW else ""
    count = f"{len(names)} of {len(verdicts)} claims{which}"
    return f"{count} {'needs' if len(names) == 1 else 'need'} variants, tasks or lengths that this study does not have."


def claims_about(task: str) -> set[str]:
    """The names of the claims that have a comparison on `task`."""
    table = read_table(VERDICTS / "comparisons.csv", {"claim": str, "task": str})
    return set(table.loc[table["task"] == task, "claim"])


def markdown_table(verdicts: pd.DataFrame) -> pd.DataFrame:
    """`verdict_table` with cells of Markdown."""
    return verdict_table(verdicts.assign(statement=[escape(statement) for statement in verdicts["statement"]]))


def verdict_table(verdicts: pd.DataFrame) -> pd.DataFrame:
    """Text: claim, verdict, effect and interval of the deciding comparison, p of the whole claim, and that comparison."""
    rows = [
        {
            "claim": f"{row.statement} ({row.source})",
            "verdict": f"**{row.verdict}**",
            "effect (95 % interval)": _effect(row),
            "p": _p(row),
            "decided by": row.reason,
        }
        for row in verdicts.itertuples()
    ]
    return pd.DataFrame(rows, columns=["claim", "verdict", "effect (95 % interval)", "p", "decided by"])


def registration_table(verdicts: pd.DataFrame) -> pd.DataFrame:
    """Text: when each claim was registered, and each later change with the earlier wording and verdict; revised claims first."""
    table = verdicts[["claim", "registered", "verdict", "revised"]].rename(columns={"verdict": "verdict now"})
    table = table.assign(revised=[escape(text) or "-" for text in table["revised"]])
    return table.sort_values("revised", key=lambda texts: texts == "-", kind="stable")


def _effect(row: Any) -> str:
    """The effect of a verdict with its interval; for a test of counts also the counts."""
    if math.isnan(row.effect):
        return "-"
    if row.test in SHARE_TESTS:
        return f"{row.k:.0f} of {row.n:.0f} ({row.low:.3f} to {row.high:.3f})"
    text = f"{row.effect:+.3f} ({row.low:+.3f} to {row.high:+.3f})"
    if row.test in COUNT_TESTS:
        return f"{row.k:.0f} of {row.n:.0f} against {row.baseline_k:.0f} of {row.baseline_n:.0f}: {text}"
    return text


def _p(row: Any) -> str:
    """The p value; in words if nothing varies, so that nothing was tested."""
    if not math.isnan(row.p):
        return "<.001" if row.p < 0.001 else f"{row.p:.3f}"
    if math.isnan(row.effect) or row.verdict == "undecided":
        return "-"
    return f"{'held' if row.verdict == 'supported' else 'failed'} in all {row.seeds} runs"
