"""Write the progress of cells while they train (pipeline/storage/live.py)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from types import TracebackType
from typing import Self

from cat.training.fit import ValidationRecord, lr_scale
from pipeline.stages.train import Cell, Job
from pipeline.storage.live import Ended, LiveWriter


class LiveFiles:
    """One file per cell in training. At the end of the block, the cells that have not ended are ended as the block."""

    def __init__(self, *, enabled: bool):
        self.enabled = enabled
        self.writers: dict[tuple[str, str], LiveWriter] = {}
        self.ended = set[tuple[str, str]]()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        how: Ended = "trained" if kind is None else "failed" if issubclass(kind, Exception) else "stopped"
        for task, variant in list(self.writers):
            self._end((task, variant), how)

    def advance(self, cell: Cell, records: Mapping[Job, ValidationRecord]) -> None:
        """Write the new records of runs."""
        training, key = cell.setting.training, (cell.task, cell.variant)
        # A cell has ended when one of its runs failed; others may still report.
        if not (self.enabled and records) or key in self.ended:
            return
        if key not in self.writers:
            self.writers[key] = LiveWriter(*key, training.steps)
        for job, record in records.items():
            schedule = job.learning_rate * lr_scale(record.step, training.steps, training.warmup) if record.step else 0.0
            self.writers[key].write({**job._asdict(), "schedule": schedule, **asdict(record)})

    def end(self, cell: Cell, how: Ended) -> None:
        """End the file of a cell."""
        self._end((cell.task, cell.variant), how)

    def _end(self, key: tuple[str, str], how: Ended) -> None:
        self.ended.add(key)
        if key in self.writers:
            self.writers.pop(key).end(how)
