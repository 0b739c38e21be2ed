"""What the figures have in common: how they come to be drawn, their looks, those of a variant, panels, ticks, and one legend."""

from __future__ import annotations

import multiprocessing
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
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

from cat.mixers.registry import ConstructionConfig
from pipeline.config.grid import shown_variants
from pipeline.config.study import Ablation, Study
from pipeline.runtime.processes import available, end_with_parent

Draw = Callable[[Study, Ablation, pd.DataFrame], Figure]


class Picture(NamedTuple):
    """A figure to be drawn: by what, of what, and into which files."""

    draw: Draw
    ablation: Ablation
    table: pd.DataFrame
    png: Path
    svg: Path


def draw_all(study: Study, pictures: Sequence[Picture]) -> None:
    """Draws and saves each, as many at a time as the study has threads, in processes; no file depends on how many they are.

    Raises what drawing one raises, once no other is under way; ValueError where a process is killed.
    """
    one, count = partial(_draw, study), min(len(pictures), available() if study.parallel_runs == "auto" else study.parallel_runs)
    if count <= 1:
        for picture in pictures:
            one(picture)
        return
    # Not `spread` of runtime/workers.py, for which torch would have to be imported, by a study that does not look inside, too.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    try:
        with ProcessPoolExecutor(count, context, _serve) as pool:
            list(pool.map(one, pictures))
    except BrokenProcessPool:
        raise ValueError("a process that draws figures was killed, as when memory runs out") from None


def _draw(study: Study, picture: Picture) -> None:
    begin(study)
    save(picture.draw(study, picture.ablation, picture.table), picture.png, picture.svg)


def _serve() -> None:
    """Ctrl-C reaches every process of a terminal and is for the first alone; where that one is killed, the others end with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()


def begin(study: Study) -> None:
    """The looks of every figure. Without a salt and with a date, an SVG would differ from run to run."""
    matplotlib.rcParams.update({"svg.hashsalt": "cat", "svg.fonttype": "none", "figure.dpi": study.render.dpi})
    sns.set_theme(style="whitegrid", context="notebook", rc={"axes.titlesize": "medium"})


def save(figure: Figure, png: Path, svg: Path) -> None:
    figure.savefig(png, format="png", bbox_inches="tight", metadata={"Software": None})
    figure.savefig(svg, format="svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)


def style(study: Study, variant: str) -> dict[str, Any]:
    """Colour, dash and marker of a variant: the same in every figure, and kept when variants are added at the end."""
    if isinstance(study.variants[variant], ConstructionConfig):
        return {"color": "black", "linestyle": ":", "marker": "x"}
    number = list(study.variants).index(variant)
    colours, dashes, markers = sns.color_palette("colorblind", 10), ["-", "--", ":"], "osD^vP*Xph<>"
    shades = [
        colours,
        *(sns.color_palette([sns.blend_palette([colour, to], 5)[2] for colour in colours]) for to in ("black", "white")),
    ]
    return {
        "color": shades[number // len(colours) % len(shades)][number % len(colours)],
        "linestyle": dashes[number % len(dashes)],  # lines that coincide show through each other
        "marker": markers[number % len(markers)],
    }


def draw_lines(
    study: Study, ablation: Ablation, table: pd.DataFrame, axes: Axes, *, x: str, y: str, markers: bool = True
) -> None:
    """Column `y` of `table` against column `x`, a line with a band over seeds for each variant that has values."""
    for variant in shown_variants(ablation):
        here = table[table["variant"] == variant]
        if here[y].notna().any():
            looks = style(study, variant)
            if not markers:
                looks["marker"] = None
            draw_line(study, here, axes, x=x, y=y, label=variant, **looks)


def draw_line(study: Study, table: pd.DataFrame, axes: Axes, *, x: str, y: str, band: float = 0.2, **looks: Any) -> None:
    """The mean over seeds, and where there are several a band; as `sns.lineplot`, which calls Python for each point, draws it."""
    seeds = table.dropna(subset=y).groupby(x)[y]
    mean, spread, several = seeds.mean(), seeds.std(), seeds.count() > 1
    low, high = (seeds.min(), seeds.max()) if study.render.error_band == "range" else (mean - spread, mean + spread)
    (line,) = axes.plot(mean.index, mean, lw=1.8, ms=6, mew=0.75, mec="w", **looks)
    axes.fill_between(mean.index, low.where(several), high.where(several), color=line.get_color(), alpha=band)


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
    """One legend for all panels, beside them."""
    found: dict[str, Any] = {}
    for axes in panels.values():
        found |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True) if label not in found}
    figure.legend(found.values(), found.keys(), loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)


def errorbar(study: Study) -> tuple[str, int]:
    return ("pi", 100) if study.render.error_band == "range" else ("sd", 1)
