"""Read logs/<task>/<variant>.json: when, by which commit and how fast a cell was trained."""

from __future__ import annotations

from typing import Any

from pipeline.storage import runs
from pipeline.storage.files import read_json
from pipeline.storage.paths import LOGS


def read_log(task: str, variant: str) -> Any | None:
    """Return `commit`, `dirty`, `started`, `seconds`, or None if the result was restored, not trained here."""
    path = LOGS / task / f"{variant}.json"
    log = read_json(path) if path.exists() else None
    return log if log is not None and log["summary"] == runs.digest(task, variant) else None
