"""Folders of the stage outputs."""

from __future__ import annotations

from pathlib import Path

PLAN, DATA, RUNS, RESULTS, REPORTS = Path("plan"), Path("data"), Path("runs"), Path("results"), Path("reports")
HELDOUT = Path("heldout")
"""Test splits, which training never reads."""
FILTERS, RATES, REFERENCES = RESULTS / "filters", RESULTS / "rates", RESULTS / "references"
SCORES, VERDICTS = Path("scores"), Path("verdicts")
LOGS = Path("logs")
"""When, by which commit and how fast cells were trained. Not a stage output, so it may differ between runs."""
CHECKPOINTS = Path("checkpoints")
