"""One live table of the cells in training; where there is no terminal, a line for each that ends."""

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

SHOWN = 20
"""Cells of the table at most."""


@dataclass
class _State:
    cell: Cell
    total: int
    """Steps of all its runs, at most."""
    weight: int
    """Tokens of a step."""
    done: int = 0
    began: float | None = None
    ended: bool = False
    row: ValidationRecord | None = None

    @property
    def name(self) -> str:
        return f"{self.cell.task} {self.cell.variant}"


class Progress:
    """Told of the steps and the ends of cells, shows what is in work, what is done, and how long the rest may take."""

    def __init__(self, cells: Iterable[Cell], processes: int, console: Console | None = None):
        self.states = {
            cell[:2]: _State(
                cell,
                total=len(cell.jobs) * cell.setting.training.steps,
                weight=cell.setting.training.batch * cell.meta.length,
            )
            for cell in cells
        }
        self.processes = processes
        self.began = time.monotonic()
        self.console = console or Console(stderr=True)
        self.live = Live(console=self.console, auto_refresh=False, transient=True) if self.console.is_terminal else None
        self.drawn = 0.0

    def __enter__(self) -> Self:
        if self.states:
            self.console.print(f"{len(self.states)} cells to train, {self.processes} runs at a time")
        if self.live:
            self.live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.live:
            self.live.stop()

    def advance(self, cell: Cell, steps: int, row: ValidationRecord | None) -> None:
        """`steps` more are done; `row` is the last look at the validation split."""
        state = self.states[cell[:2]]
        state.began = state.began or time.monotonic()
        state.done += steps
        state.row = row or state.row
        self._draw()

    def end(self, cell: Cell, seconds: float, rows: list[ValidationRecord]) -> None:
        """Every run of the cell has ended, `seconds` after the first began; those that count were last seen at `rows`."""
        seen = ""
        if rows:
            loss, accuracy = fmean(row.train_loss for row in rows), fmean(row.valid_accuracy for row in rows)
            seen = f", accuracy {accuracy:.3f}" if math.isnan(loss) else f", loss {loss:.3f}, accuracy {accuracy:.3f}"
        self._end(cell, f"trained in {seconds:.1f} s{seen}")

    def fail(self, cell: Cell) -> None:
        """A run of the cell has failed."""
        self._end(cell, "failed", style="red")

    def _end(self, cell: Cell, words: str, style: str | None = None) -> None:
        state = self.states[cell[:2]]
        if not state.ended:
            state.ended, state.done = True, state.total
            ended = sum(s.ended for s in self.states.values())
            self.console.print(f"[{ended}/{len(self.states)}] {state.name}: {words}", style=style, markup=False)
        self._draw()

    def _draw(self) -> None:
        now = time.monotonic()
        if self.live and now - self.drawn > 0.2:
            self.drawn = now
            self.live.update(self.table(), refresh=True)

    def table(self) -> Group:
        """What is in work now, and a line about all of it."""
        table = Table("cell", "steps", "loss", "accuracy", "time left", box=None, pad_edge=False)
        now = time.monotonic()
        working = [s for s in self.states.values() if s.began is not None and not s.ended]
        for state in working[:SHOWN]:
            row = state.row
            table.add_row(
                state.name,
                f"{state.done:,} of {state.total:,}",
                f"{row.train_loss:.3f}" if row else "-",
                f"{row.valid_accuracy:.3f}" if row else "-",
                _clock(self._left(state, now)),
            )
        done = sum(s.done * s.weight for s in self.states.values())
        total = sum(s.total * s.weight for s in self.states.values())
        left = (now - self.began) * (total - done) / done if done else None
        ended = sum(s.ended for s in self.states.values())
        return Group(table, Text(f"{ended} of {len(self.states)} cells, {done / total:.0%} of the steps, {_clock(left)} left"))

    def _left(self, state: _State, now: float) -> float | None:
        return (now - (state.began or now)) * (state.total - state.done) / state.done if state.done else None


def _clock(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"
