"""When, by which commit and how fast each cell was trained, and how long other stages took.

    logs/<task>/<variant>.json    of the cells that were trained in this folder; not in git
    logs/.stages/<command>.json   seconds of the stages that ran in this folder
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

TABLE = REPORTS / "training.csv"
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
    row = _read_table().get((task, variant))
    if row is None or row["summary"] != runs.digest(task, variant):
        return None
    return {
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
    with suppress(ValueError, KeyError, TypeError):
        return float((read_json(path) if path.exists() else _read_table()[task, variant])["seconds"])
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
    return LOGS / ".stages" / f"{'-'.join(filter(None, (command, task)))}.json"


def write_table(cells: Iterable[Cell]) -> None:
    """Add the results that were trained here, and remove those that are no longer there. Other rows stay as they are."""
    old, rows = _read_table(), []
    for cell in cells:
        key = cell.task, cell.variant
        log, row = read_log(*key), old.get(key)
        if log is not None and row is not None and row["summary"] == log["summary"]:
            rows.append(row)
        elif log is not None:
            started = datetime.fromtimestamp(log["started"], UTC).isoformat()
            rows.append({**log, "task": cell.task, "variant": cell.variant, "started": started})
    if rows != list(old.values()):
        with atomic_write(TABLE) as path:
            write_csv(path, ({column: row[column] for column in COLUMNS} for row in rows), COLUMNS)


def _read_table() -> dict[tuple[str, str], dict[str, str]]:
    if not TABLE.exists():
        return {}
    with readable(TABLE, "a table of trainings"), TABLE.open(newline="", encoding="utf-8") as file:
        return {(row["task"], row["variant"]): {column: row[column] for column in COLUMNS} for row in csv.DictReader(file)}
