"""Show cells in training as a live table, or without a terminal a line per minute, finished run and finished cell."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cat.training.fit import ValidationRecord
from pipeline.stages.train import LOG_SECONDS, Cell, Job, Trained

MAX_ROWS = 20
"""Maximum number of cells in the table."""


@dataclass
class _CellProgress:
    cell: Cell
    total: int
    """Maximum number of steps over all runs of the cell."""
    tokens_per_step: float
    done: int = 0
    started: float | None = None
    ended: bool = False
    record: ValidationRecord | None = None

    @property
    def name(self) -> str:
        return f"{self.cell.task} {self.cell.variant}"


class Progress:
    """Shows cells in training, finished cells and the remaining time."""

    def __init__(self, cells: Iterable[Cell], processes: int, console: Console | None = None):
        self.states = {
            cell[:2]: _CellProgress(
                cell,
                total=len(cell.jobs) * cell.setting.training.steps,
                tokens_per_step=cell.setting.training.batch * cell.meta.mean_length,
            )
            for cell in cells
        }
        self.processes = processes
        self.started = time.monotonic()
        self.console = console or Console(stderr=True)
        self.live = Live(console=self.console, auto_refresh=False, transient=True) if self.console.is_terminal else None
        self.last_drawn = 0.0
        self.over = threading.Event()

    def __enter__(self) -> Self:
        if self.states:
            self.console.print(f"{len(self.states)} cells to train, {self.processes} runs at a time")
        if self.live:
            self.live.start()
        elif self.states:
            threading.Thread(target=self._print_each_minute, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.over.set()
        if self.live:
            self.live.stop()

    def advance(self, cell: Cell, steps: int, records: Mapping[Job, ValidationRecord]) -> None:
        """Count `steps` more steps and show the last of the new `records`."""
        state = self.states[cell[:2]]
        state.started = state.started or time.monotonic()
        state.done += steps
        for record in records.values():
            state.record = record
        self._draw()

    def end_run(self, cell: Cell, run: Trained) -> None:
        """Report that a run of the cell has ended; the table shows only cells."""
        if self.live is None:
            record = f", accuracy {run.history[-1].valid_accuracy:.3f}" if run.history and not run.diverged else ""
            rate, seed = run.job
            name = f"{cell.task} {cell.variant}, learning rate {rate:g}, seed {seed}"
            self._print(f"{name}: {run.steps:,} steps{record}, ended by {run.stop}")

    def end(self, cell: Cell, seconds: float, records: list[ValidationRecord]) -> None:
        """Report that the cell was trained in `seconds`; `records` are the last ones of its runs that count."""
        scores = ""
        if records:
            loss, accuracy = fmean(record.train_loss for record in records), fmean(record.valid_accuracy for record in records)
            scores = f", accuracy {accuracy:.3f}" if math.isnan(loss) else f", loss {loss:.3f}, accuracy {accuracy:.3f}"
        self._end(cell, f"trained in {seconds:.1f} s{scores}")

    def fail(self, cell: Cell) -> None:
        self._end(cell, "failed", style="red")

    def _end(self, cell: Cell, message: str, style: str | None = None) -> None:
        state = self.states[cell[:2]]
        if not state.ended:
            state.ended, state.done = True, state.total
            ended = sum(s.ended for s in self.states.values())
            self._print(f"[{ended}/{len(self.states)}] {state.name}: {message}", style)
        self._draw()

    def _print(self, line: str, style: str | None = None) -> None:
        # One line of any length, so that a log can be searched.
        self.console.print(line, style=style, markup=False, soft_wrap=self.live is None)

    def _print_each_minute(self) -> None:
        while not self.over.wait(LOG_SECONDS):
            running = ", ".join(
                f"{s.name} {s.done:,} of {s.total:,} steps" + (f" (loss {s.record.train_loss:.3f})" if s.record else "")
                for s in self._running()
            )
            self._print(f"{self._summary()}; in training: {running or 'none'}")

    def _running(self) -> list[_CellProgress]:
        return [s for s in list(self.states.values()) if s.started is not None and not s.ended]

    def _draw(self) -> None:
        now = time.monotonic()
        if self.live and now - self.last_drawn > 0.2:
            self.last_drawn = now
            self.live.update(self.table(), refresh=True)

    def table(self) -> Group:
        """Return a table of the cells in training and a line about the whole study."""
        table = Table("cell", "steps", "loss", "accuracy", "time left", box=None, pad_edge=False)
        now = time.monotonic()
        for state in self._running()[:MAX_ROWS]:
            record = state.record
            table.add_row(
                state.name,
                f"{state.done:,} of {state.total:,}",
                f"{record.train_loss:.3f}" if record else "-",
                f"{record.valid_accuracy:.3f}" if record else "-",
                _clock(_seconds_left(state, now)),
            )
        return Group(table, Text(self._summary()))

    def _summary(self) -> str:
        now = time.monotonic()
        done = sum(s.done * s.tokens_per_step for s in self.states.values())
        total = sum(s.total * s.tokens_per_step for s in self.states.values())
        left = (now - self.started) * (total - done) / done if done else None
        ended = sum(s.ended for s in self.states.values())
        return f"{ended} of {len(self.states)} cells, {done / total:.0%} of the steps, {_clock(left)} left"


def _seconds_left(state: _CellProgress, now: float) -> float | None:
    return (now - (state.started or now)) * (state.total - state.done) / state.done if state.done else None


def _clock(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"
