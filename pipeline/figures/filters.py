"""Trained filters beside the theorem's."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cat.mixers.registry import ConstructionConfig
from pipeline.config.grid import shown_tasks, shown_variants
from pipeline.config.study import Ablation, Study
from pipeline.figures.common import trained_variants
from pipeline.figures.style import add_legend, set_ticks, style
from pipeline.storage.results import read_filters

LAGS = 16
"""Of a filter as long as the sequence, so many are drawn."""


def filters(study: Study, ablation: Ablation, results: pd.DataFrame) -> Figure:
    """The taps of every filter as stems, a row a task and variant, a column a stream; the theorem's beside them.

    Each is divided by its largest tap, since attention takes up any factor; of long filters the first LAGS tokens back.
    """
    tables = {task: read_filters(task) for task in shown_tasks(study, ablation)}
    cells = [(t, v) for t in tables for v in trained_variants(study, ablation) if v in set(tables[t]["variant"])]
    theorems = [v for v in shown_variants(ablation) if isinstance(study.variants[v], ConstructionConfig)]
    streams = ("q", "k", "v")
    rows = max(len(cells), 1)
    figure, grid = plt.subplots(
        rows, 3, figsize=(10.5, 2.1 * rows), squeeze=False, sharex=True, sharey=True, layout="constrained"
    )
    if not cells:
        grid[0, 0].set_title("no seed of any variant has ended with a filter")
    for (task, variant), row in zip(cells, grid, strict=bool(cells)):
        for stream, axes in zip(streams, row, strict=True):
            here = tables[task][(tables[task]["projection"] == stream) & (tables[task]["lag"] < LAGS)]
            prescribed = here[here["variant"].isin(theorems) & (here["seed"] == study.seeds[0])]
            _stems(axes, prescribed, -0.15, color="black", marker="x", linestyle=":", label="theorem")
            trained = here[(here["variant"] == variant) & here["seed"].isin(study.seeds)]
            _stems(
                axes, trained, 0.1, color=style(study, variant)["color"], marker="o", linestyle="-", label="trained, each seed"
            )
            axes.axhline(0, color="0.5", lw=0.8)
            axes.set_title(f"{variant} on {task}: {stream}" + ("" if len(trained) else ", no filter"))
    lags = pd.concat([table["lag"] for table in tables.values()])
    set_ticks(grid[0, 0], range(max(lags[lags < LAGS].max(), 1) + 1 if len(lags) else 2), "{:g}")
    for axes in grid[-1]:
        axes.set_xlabel("tokens back")
    for axes in grid[:, 0]:
        axes.set_ylabel("tap / largest tap")
    add_legend(figure, {str(at): axes for at, axes in enumerate(grid.flat)})
    return figure


def _stems(axes: Axes, taps: pd.DataFrame, shift: float, *, color: Any, marker: str, linestyle: str, label: str) -> None:
    """The filters of every layer, row and seed side by side."""
    for place, (_, one) in enumerate(taps.groupby(["variant", "layer", "head", "seed"], sort=True)):
        largest = one["value"].iloc[one["value"].abs().argmax()]
        heights = one["value"] / largest if largest else one["value"]
        at = one["lag"] + shift + 0.08 * place
        for x, height in zip(at, heights, strict=True):
            axes.plot([x, x], [0, height], linestyle, color=color, lw=1.6)
        axes.plot(at, heights, marker, color=color, ms=5, label=label if place == 0 else None)
