"""What the figures have in common: their looks, those of a variant, panels by task, ticks, and one legend."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from cat.configuration import Theory
from pipeline.params import Ablation, Study, shown_variants


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
    if isinstance(study.variants[variant], Theory):
        return {"color": "black", "linestyle": ":", "marker": "x"}
    number = list(study.variants).index(variant)
    colours, dashes, markers = sns.color_palette("colorblind", 10), ["-", "--", ":"], "osD^vP*Xph<>"
    return {
        "color": colours[number % len(colours)],
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
            sns.lineplot(here, x=x, y=y, ax=axes, label=variant, errorbar=errorbar(study), legend=False, lw=1.8, ms=6, **looks)


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
    return ("pi", 100) if study.render.spread == "range" else ("sd", 1)
