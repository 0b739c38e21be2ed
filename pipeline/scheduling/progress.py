"""Show cells in training as a live table, or without a terminal one line per finished cell."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cat.training.fit import ValidationRecord
from pipeline.stages.train import Cell

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

    def __enter__(self) -> Self:
        if self.states:
            self.console.print(f"{len(self.states)} cells to train, {self.processes} runs at a time")
        if self.live:
            self.live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.live:
            self.live.stop()

    def advance(self, cell: Cell, steps: int, record: ValidationRecord | None) -> None:
        """Count `steps` more steps and show `record`, if there is a new one."""
        state = self.states[cell[:2]]
        state.started = state.started or time.monotonic()
        state.done += steps
        state.record = record or state.record
        self._draw()

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
            self.console.print(f"[{ended}/{len(self.states)}] {state.name}: {message}", style=style, markup=False)
        self._draw()

    def _draw(self) -> None:
        now = time.monotonic()
        if self.live and now - self.last_drawn > 0.2:
            self.last_drawn = now
            self.live.update(self.table(), refresh=True)

    def table(self) -> Group:
        """Return a table of the cells in training and a line about the whole study."""
        table = Table("cell", "steps", "loss", "accuracy", "time left", box=None, pad_edge=False)
        now = time.monotonic()
        running = [s for s in self.states.values() if s.started is not None and not s.ended]
        for state in running[:MAX_ROWS]:
            record = state.record
            table.add_row(
                state.name,
                f"{state.done:,} of {state.total:,}",
                f"{record.train_loss:.3f}" if record else "-",
                f"{record.valid_accuracy:.3f}" if record else "-",
                _clock(_seconds_left(state, now)),
            )
        done = sum(s.done * s.tokens_per_step for s in self.states.values())
        total = sum(s.total * s.tokens_per_step for s in self.states.values())
        left = (now - self.started) * (total - done) / done if done else None
        ended = sum(s.ended for s in self.states.values())
        return Group(table, Text(f"{ended} of {len(self.states)} cells, {done / total:.0%} of the steps, {_clock(left)} left"))


def _seconds_left(state: _CellProgress, now: float) -> float | None:
    return (now - (state.started or now)) * (state.total - state.done) / state.done if state.done else None


def _clock(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"
