"""Read and write the progress of cells in training: checkpoints/<task>/<variant>/live.jsonl.

    the first line    task, variant, steps per run, time
    each validation   time, learning_rate, seed, step, schedule (the learning rate now), and the columns of history.csv
    the last line     time, ended: trained, failed or stopped; it is missing if the process was killed

The process that trains a cell writes its file; everything else only reads it. It is no output of a stage.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Literal

from filelock import FileLock, Timeout

from pipeline.storage.paths import CHECKPOINTS

FILE = "live.jsonl"
Row = dict[str, Any]
Ended = Literal["trained", "failed", "stopped"]


class LiveWriter:
    """The file of a cell in training. It holds a lock, which ends with the process.

    A file that cannot be written does not stop the training: its lines are dropped.
    """

    def __init__(self, task: str, variant: str, steps: int):
        self.path = CHECKPOINTS / task / variant / FILE
        self.lock = _lock(self.path)
        self.file: IO[str] | None = None
        with suppress(OSError, Timeout):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.lock.acquire(timeout=1)
            # A new file, so that a reader sees that the cell starts again.
            self.path.unlink(missing_ok=True)
            self.file = self.path.open("w", encoding="utf-8", buffering=1)
            self.write({"task": task, "variant": variant, "steps": steps})

    def write(self, row: Row) -> None:
        """Append a row with the present time."""
        with suppress(OSError):
            if self.file is not None:
                self.file.write(json.dumps({"time": time.time(), **row}) + "\n")

    def end(self, how: Ended) -> None:
        """Write the last line and close the file."""
        self.write({"ended": how})
        with suppress(OSError):
            if self.file is not None:
                self.file.close()
        self.lock.release()


class LiveReader:
    """Reads a file while it grows."""

    def __init__(self, path: Path):
        self.path = path
        self.first_line, self.offset = b"", 0

    def read(self) -> Iterator[Row]:
        """Yield the rows since the last call; all rows if the file is a new one."""
        try:
            with self.path.open("rb") as file:
                # The first line has the time of its writing; a file system may give a new file the number of the old one.
                if (first_line := file.readline()) != self.first_line:
                    self.first_line, self.offset = first_line, 0
                file.seek(self.offset)
                content = file.read()
        except OSError:
            return
        whole = content[: content.rfind(b"\n") + 1]
        self.offset += len(whole)
        for line in whole.splitlines():
            with suppress(ValueError):
                yield json.loads(line)


def live_paths() -> list[Path]:
    """List the files of all cells."""
    return sorted(CHECKPOINTS.glob(f"*/*/{FILE}"))


def is_training(path: Path) -> bool:
    """Whether a process writes the file."""
    try:
        with _lock(path).acquire(timeout=0):
            return False
    except Timeout:
        return True
    except OSError:
        return False


def _lock(path: Path) -> FileLock:
    return FileLock(path.with_suffix(".lock"))
