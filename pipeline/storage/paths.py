"""Where each stage keeps its files."""

from __future__ import annotations

from pathlib import Path

PLAN, DATA, RUNS, RESULTS, REPORTS = Path("plan"), Path("data"), Path("runs"), Path("results"), Path("reports")
HELDOUT = Path("heldout")
"""What training does not see of the tasks: their test splits."""
FILTERS, POSITIONS = RESULTS / "filters", RESULTS / "positions"
SCORES, VERDICTS = Path("scores"), Path("verdicts")
LOGS = Path("logs")
"""What a run is not made of: when, where and how fast. Not an output of any stage, so it may differ from run to run."""
CHECKPOINTS = Path("checkpoints")
