"""Take folders of older studies out of DVC's way.

`evaluate`, `render` and `publish` depend on whole folders, such as `runs/ar`. A folder in them that is no cell of the study would
count: the stages would run again, and dvc.lock would differ from that of a clone.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from pipeline.config.grid import cells
from pipeline.config.study import Study
from pipeline.storage.paths import DATA, HELDOUT, RUNS

LEFTOVER = Path("leftover")
"""Holds them at their old paths. Nothing reads it. It is not in paths.py, which belongs to the code of every cell."""


def set_aside(study: Study) -> list[str]:
    """Move the folders in data/, heldout/ and runs/ that the study does not have to leftover/. Return a line about each."""
    lines = []
    for folder in list(_leftovers(study)):
        target = LEFTOVER / folder
        shutil.rmtree(target, ignore_errors=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(folder, target)
        lines.append(f"{folder}: is not in this study; moved to {target}")
    for task in _folders(RUNS):
        if task.name not in study.tasks and not any(task.iterdir()):
            task.rmdir()
    return lines


def _leftovers(study: Study) -> Iterator[Path]:
    expected = {(cell.task, cell.variant) for cell in cells(study)}
    for folder in (DATA, HELDOUT):
        yield from (task for task in _folders(folder) if task.name not in study.tasks)
    for task in _folders(RUNS):
        yield from (cell for cell in _folders(task) if (task.name, cell.name) not in expected)


def _folders(parent: Path) -> list[Path]:
    """The folders in a folder that no process is writing."""
    return [path for path in sorted(parent.glob("*")) if path.is_dir() and not path.name.startswith(".")]
