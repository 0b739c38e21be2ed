"""Where the stages keep what, and how it is written: under a temporary name, renamed when it is whole."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import TypeAdapter

from cat.tasks import Examples, Task, TaskConfiguration

DATA, RUNS, RESULTS, REPORTS = Path("data"), Path("runs"), Path("results"), Path("reports")
FILTERS = RESULTS / "filters"
SCORES, VERDICTS = Path("scores"), Path("verdicts")
LOGS = Path("logs")
"""What a run is not made of: when, where and how fast. Not an output of any stage, so it may differ from run to run."""


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary sibling of `path`, a file or a folder to be; it replaces `path` when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    _remove(part)
    try:
        yield part
        _remove(path)
        part.rename(path)
    finally:
        _remove(part)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write_csv(path: Path, rows: Iterable[dict[str, Any]], columns: Iterable[str]) -> None:
    """Numbers are written so that reading them back gives the same bits; None and nan as an empty field."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(columns), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({key: "" if value != value else value for key, value in row.items()})


class Meta(NamedTuple):
    """What a model and its scores need to know of a task's data."""

    vocabulary: int
    length: int
    lengths: tuple[int, ...]
    goal: str
    autoregressive: bool


def read_meta(task: str) -> Meta:
    meta = read_json(DATA / task / "meta.json")
    return Meta(meta["vocabulary"], meta["length"], tuple(meta["lengths"]), meta["goal"], meta["autoregressive"])


def read_task(task: str) -> Task:
    """The configuration that the task's data were generated from."""
    return TypeAdapter(TaskConfiguration).validate_python(read_json(DATA / task / "meta.json")["config"])


def read_split(task: str, split: str) -> Examples:
    with np.load(DATA / task / f"{split}.npz", allow_pickle=False) as arrays:
        return Examples(arrays["inputs"], arrays["targets"])
