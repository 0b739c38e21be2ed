"""Write the progress of cells while they train (pipeline/storage/live.py), and let MLflow show it (pipeline/tracking/live.py)."""

from __future__ import annotations

import math
import subprocess
import time
from collections.abc import Mapping
from dataclasses import asdict
from types import TracebackType
from typing import Self

from cat.training.fit import ValidationRecord, lr_scale
from pipeline.stages.train import Cell, Job
from pipeline.storage.live import Ended, LiveWriter
from pipeline.tracking import live

STUDY_DELAY = 5.0
"""Seconds of training before a study is shown in MLflow: one that ends sooner does not start a process for it."""
STAGE_DELAY = 300.0
"""The same for a stage of `dvc repro`: it has its own process, which takes three seconds to end."""


class LiveFiles:
    """One file per cell in training, shown in MLflow after `delay` seconds.

    At the end of the block, the cells that have not ended are ended as the block.
    """

    def __init__(self, *, enabled: bool, delay: float):
        self.enabled = enabled
        self.show_at = time.monotonic() + delay
        self.forwarder: subprocess.Popen[bytes] | None = None
        self.writers: dict[tuple[str, str], LiveWriter] = {}
        self.ended = set[tuple[str, str]]()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        how: Ended = "trained" if kind is None else "failed" if issubclass(kind, Exception) else "stopped"
        for task, variant in list(self.writers):
            self._end((task, variant), how)
        if self.forwarder is not None:
            live.end(self.forwarder)

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
        if time.monotonic() > self.show_at:
            self.show_at = math.inf
            self.forwarder = live.start()

    def end(self, cell: Cell, how: Ended) -> None:
        """End the file of a cell."""
        self._end((cell.task, cell.variant), how)

    def _end(self, key: tuple[str, str], how: Ended) -> None:
        self.ended.add(key)
        if key in self.writers:
            self.writers.pop(key).end(how)
