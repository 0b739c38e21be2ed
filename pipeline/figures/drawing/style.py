"""Shared by all figures: drawing in parallel, theme, lines, panels, ticks, legend."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from pipeline.config.grid import shown_variants
from pipeline.config.study import Ablation, Study
from pipeline.figures.drawing.palette import style
from pipeline.reporting.labels import variant_label
from pipeline.runtime import workers
from pipeline.runtime.processes import available

FEW = 4
"""Lines of a figure whose bands may overlap without hiding other lines."""


class Picture(NamedTuple):
    """A figure to draw, and the SVG file to write."""

    draw: Callable[[Study], Figure]
    file: Path


def draw_all(study: Study, pictures: Sequence[Picture]) -> None:
    """Draw and save all pictures in `parallel_runs` processes; the files do not depend on their number.

    Raises the first error of drawing a picture, and ValueError if a process is killed.
    """
    count = min(len(pictures), available() if study.parallel_runs == "auto" else study.parallel_runs)
    if count <= 1:
        for picture in pictures:
            _draw(study, picture)
        return
    # No device: the workers of this pool need no torch.
    jobs = workers.run_jobs(
        partial(_draw, study), pictures, devices=[None] * count, method=workers.start_method(), report=lambda index, message: None
    )
    with closing(jobs) as outcomes:
        for _, outcome in outcomes:
            if isinstance(outcome, workers.Failure):
                if isinstance(outcome.error, ChildProcessError):
                    raise ValueError("a process that draws figures was killed, perhaps because memory ran out")
                raise outcome.error


def _draw(study: Study, picture: Picture, *device_and_report: Any) -> None:
    set_theme()
    save(picture.draw(study), picture.file)


def set_theme() -> None:
    """Set the theme of every figure. The fixed salt makes an SVG the same in every run."""
    matplotlib.rcParams.update({"svg.hashsalt": "cat", "svg.fonttype": "none"})
    sns.set_theme(style="whitegrid", context="notebook", rc={"axes.titlesize": "medium"})


def save(figure: Figure, file: Path) -> None:
    """Write an SVG file without a date, so that it is the same in every run."""
    figure.savefig(file, format="svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)


def draw_lines(
    study: Study,
    ablation: Ablation,
    table: pd.DataFrame,
    axes: Axes,
    *,
    x: str,
    y: str,
    markers: bool = True,
    without: Collection[str] = (),
) -> None:
    """Plot column `y` of `table` against column `x`: one line with a band over seeds per variant that has values."""
    shown = [variant for variant in shown_variants(ablation) if variant not in without]
    alpha = 0.2 if len(shown) <= FEW else 0.1
    for variant in shown:
        rows = table[table["variant"] == variant]
        if rows[y].notna().any():
            options = style(study, variant)
            if not markers:
                options["marker"] = None
            draw_line(study, rows, axes, x=x, y=y, alpha=alpha, label=variant_label(study, variant), **options)


def draw_line(study: Study, table: pd.DataFrame, axes: Axes, *, x: str, y: str, alpha: float = 0.2, **options: Any) -> None:
    """Plot the mean over seeds, with a band if there are several. Equal to `sns.lineplot`, which calls Python per point."""
    seeds = table.dropna(subset=y).groupby(x)[y]
    mean, spread, several = seeds.mean(), seeds.std(), seeds.count() > 1
    low, high = (seeds.min(), seeds.max()) if study.render.error_band == "range" else (mean - spread, mean + spread)
    (line,) = axes.plot(mean.index, mean, **{"lw": 1.8, "ms": 6, "mew": 0.75, "mec": "w", **options})
    axes.fill_between(mean.index, low.where(several), high.where(several), color=line.get_color(), alpha=alpha)


def panels_of(tasks: Iterable[str]) -> tuple[Figure, dict[str, Axes]]:
    tasks = list(tasks)
    figure, grid = plt.subplots(1, len(tasks), figsize=(4.4 * len(tasks), 3.8), squeeze=False)
    figure.tight_layout(w_pad=2.5)
    return figure, dict(zip(tasks, grid[0], strict=True))


def set_ticks(axes: Axes, values: Iterable[float], form: str) -> None:
    values = list(values)
    axes.xaxis.set_major_locator(FixedLocator(values))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([form.format(value) for value in values])


def add_legend(figure: Figure, panels: dict[str, Axes]) -> None:
    """Add one legend for all panels, to their right. Lines in the background, such as references, come last."""
    entries: dict[str, Any] = {}
    for axes in panels.values():
        entries |= {label: line for line, label in zip(*axes.get_legend_handles_labels(), strict=True) if label not in entries}
    labels = sorted(entries, key=lambda label: -entries[label].get_zorder())
    handles = [entries[label] for label in labels]
    figure.legend(handles, labels, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)


def errorbar(study: Study) -> tuple[str, int]:
    return ("pi", 100) if study.render.error_band == "range" else ("sd", 1)
