"""When, by which commit and how fast each cell was trained, and how long other stages took.

    logs/<task>/<variant>.json    of the cells that were trained in this folder; not in git
    .pipeline_cache/              seconds of the stages that ran in this folder; not in logs/, which MLflow shows
    reports/training.csv          of the results in git, so that a clone has the dates of the results that it restores

A row of the table stays as long as its result does: training it again to the same bits changes no file in git.
"""

from __future__ import annotations

import csv
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.config.grid import Cell
from pipeline.storage import runs
from pipeline.storage.files import atomic_write, read_json, readable, write_csv, write_json
from pipeline.storage.paths import LOGS, REPORTS

STAGES = Path(".pipeline_cache/stages")
TABLE, OLDER = REPORTS / "training.csv", LOGS / ".older.csv"
"""OLDER has the rows of results that were replaced: DVC's cache can restore them."""
COLUMNS = ("task", "variant", "commit", "dirty", "experiment", "started", "seconds", "summary")
"""`summary` is the SHA-256 of the cell's summary.json, which identifies the result."""


def log_path(task: str, variant: str) -> Path:
    return LOGS / task / f"{variant}.json"


def read_log(task: str, variant: str) -> Any | None:
    """Return `commit`, `dirty`, `experiment`, `started` and `seconds` of the training of a result.

    Of a result that was restored, not trained here, they are those in the table. Return None if neither is known.
    """
    path = log_path(task, variant)
    log = read_json(path) if path.exists() else None
    if log is not None and log["summary"] == runs.digest(task, variant):
        return log
    rows = [row for row in _read_tables() if (row["task"], row["variant"]) == (task, variant)]
    row = next((row for row in rows if row["summary"] == runs.digest(task, variant)), None)
    return row and {
        **row,
        "commit": row["commit"] or None,
        "dirty": {"True": True, "False": False}.get(row["dirty"]),
        "experiment": row["experiment"] or None,
        "started": datetime.fromisoformat(row["started"]).timestamp(),
        "seconds": float(row["seconds"]),
    }


def training_seconds(task: str, variant: str) -> float | None:
    """The seconds of the last training of a cell that is known, whatever its settings were then."""
    path = log_path(task, variant)
    rows = [row for row in _read_tables() if (row["task"], row["variant"]) == (task, variant)]
    with suppress(ValueError, KeyError, TypeError, IndexError):
        return float((read_json(path) if path.exists() else rows[0])["seconds"])
    return None


def stage_seconds(command: str, task: str | None = None) -> float | None:
    """The seconds of the last `python -m pipeline <command> [task]` in this folder, or None."""
    path = _stage_path(command, task)
    return float(read_json(path)["seconds"]) if path.exists() else None


@contextmanager
def timed_stage(command: str, task: str | None = None) -> Iterator[None]:
    """Record the seconds of a stage that succeeds."""
    start = time.monotonic()
    yield
    with atomic_write(_stage_path(command, task)) as path:
        write_json(path, {"seconds": time.monotonic() - start})


def _stage_path(command: str, task: str | None) -> Path:
    return STAGES / f"{'-'.join(filter(None, (command, task)))}.json"


def write_table(cells: Iterable[Cell]) -> None:
    """Add the results that were trained here, and remove missing ones. Other rows stay as they are."""
    known = {(row["task"], row["variant"], row["summary"]): row for row in _read_tables()[::-1]}
    rows = []
    for cell in cells:
        if log := read_log(cell.task, cell.variant):
            started = datetime.fromtimestamp(log["started"], UTC).isoformat()
            new = {**log, "task": cell.task, "variant": cell.variant, "started": started}
            rows.append(known.get((cell.task, cell.variant, log["summary"]), new))
    old = _read_table(TABLE)
    if rows != old:
        _write(OLDER, [*_read_table(OLDER), *(row for row in old if row not in rows)])
        _write(TABLE, rows)


def _read_tables() -> list[dict[str, str]]:
    return [*_read_table(TABLE), *_read_table(OLDER)]


def _read_table(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with readable(path, "a table of trainings"), path.open(newline="", encoding="utf-8") as file:
        return [{column: row[column] for column in COLUMNS} for row in csv.DictReader(file)]


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    unique = {(row["task"], row["variant"], row["summary"]): row for row in rows}.values()
    with atomic_write(path) as part:
        write_csv(part, ({column: row[column] for column in COLUMNS} for row in unique), COLUMNS)
