"""Show the runs in training from their files (pipeline/storage/live.py): a table, or without a terminal a line per change."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table

from pipeline.storage.live import LiveReader, Row, is_training, live_paths

INTERVAL = 2.0
"""Seconds between two looks at the files."""
COLUMNS = ("cell", "seed", "rate", "state", "step", "loss", "accuracy", "grad norm", "rate now")


@dataclass
class _Cell:
    """The content of a cell's file."""

    reader: LiveReader
    steps: int = 0
    ended: str | None = None
    last: dict[tuple[float, int], Row] = field(default_factory=dict)
    """(Learning rate, seed) of a run -> its last row."""

    @property
    def name(self) -> str:
        return " ".join(self.reader.path.parts[-3:-1])

    def update(self) -> None:
        for row in self.reader.read():
            if "steps" in row:
                self.steps, self.ended, self.last = row["steps"], None, {}
            elif "seed" in row:
                self.last[row["learning_rate"], row["seed"]] = row
            else:
                self.ended = row["ended"]

    @property
    def state(self) -> str:
        return self.ended or ("training" if is_training(self.reader.path) else "killed")

    def lines(self) -> Iterator[tuple[str, ...]]:
        """Yield the cells of COLUMNS for each run."""
        state = self.state
        for (rate, seed), row in sorted(self.last.items()):
            numbers = (
                f"{row['train_loss']:.3f}",
                f"{row['valid_accuracy']:.3f}",
                f"{row['grad_norm']:.2f}",
                f"{row['schedule']:.2g}",
            )
            yield self.name, str(seed), f"{rate:g}", state, f"{row['step']:,} of {self.steps:,}", *numbers


def watch(*, once: bool = False, console: Console | None = None) -> None:
    """Show the runs until Ctrl-C; `once` shows the present state and returns."""
    console = console or Console()
    cells: dict[Path, _Cell] = {}
    if once or not console.is_terminal:
        _print_changes(cells, console, once=once)
        return
    with Live(console=console, auto_refresh=False) as live:
        while True:
            live.update(_table(_lines(cells, running=True)), refresh=True)
            time.sleep(INTERVAL)


def _print_changes(cells: dict[Path, _Cell], console: Console, *, once: bool) -> None:
    shown: set[tuple[str, ...]] = set()
    while True:
        lines = list(_lines(cells, running=not once))
        for line in lines:
            if line not in shown:
                cell, seed, rate, state, steps, loss, accuracy, grad_norm, rate_now = line
                run = f"{cell}, seed {seed}, learning rate {rate}: {state}, {steps} steps"
                scores = f"loss {loss}, accuracy {accuracy}, gradient norm {grad_norm}, learning rate now {rate_now}"
                console.print(f"{run}, {scores}", markup=False, highlight=False, soft_wrap=True)
        shown = set(lines)
        if once:
            if not lines:
                console.print("no run is in training, and none was", soft_wrap=True)
            return
        time.sleep(INTERVAL)


def _lines(cells: dict[Path, _Cell], *, running: bool) -> list[tuple[str, ...]]:
    """The lines of all cells; with `running`, only of those that were in training when first seen."""
    for path in live_paths():
        if path not in cells and not (running and not is_training(path)):
            cells[path] = _Cell(LiveReader(path))
    for cell in cells.values():
        cell.update()
    return [line for cell in cells.values() for line in cell.lines()]


def _table(lines: list[tuple[str, ...]]) -> Table:
    table = Table(*COLUMNS, box=None, pad_edge=False)
    for line in lines:
        table.add_row(*line)
    return table
