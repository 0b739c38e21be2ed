"""Bits per byte along the context."""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from pipeline.config.grid import shown_on, shown_tasks, shown_variants
from pipeline.config.study import Ablation, Study
from pipeline.figures.style import add_legend, draw_line, panels_of, set_ticks
from pipeline.storage.results import read_positions


def positions(study: Study, ablation: Ablation, results: pd.DataFrame) -> Figure:
    """Bits per byte against the position in the longest test windows by variant, a panel a task.

    Solid where a model reads from the start; dashed, from the training length on, where its window slides along.
    """
    figure, panels = panels_of(shown_tasks(study, ablation))
    # Dashes tell windows here, not variants, so that colours must differ within the figure.
    colours = dict(zip(shown_variants(ablation), sns.color_palette("colorblind", len(shown_variants(ablation))), strict=True))
    for task, axes in panels.items():
        table, trained = _positions(study, ablation, task), study.tasks[task].data.length
        full, sliding = table["context"] == "full", (table["context"] == "sliding") & (table["position"] >= trained)
        for variant in shown_on(study, ablation, task):
            for chosen, dash in ((full, "-"), (sliding, "--")):
                here = table[chosen & (table["variant"] == variant)]
                if len(here):  # a seed that diverged has none
                    draw_line(
                        study, here, axes, x="position", y="bits_per_byte", color=colours[variant], linestyle=dash,
                        label=variant if dash == "-" else None, band=0.15,
                    )  # fmt: skip
        axes.set_xscale("log", base=2)
        set_ticks(axes, _doubled(table["position"].min(), table["position"].max()), "{:g}")
        axes.axvline(trained, color="0.6", lw=1, ls=":", zorder=0)
        axes.set(title=task, xlabel=f"position; dashed: a window of {trained} slides along", ylabel="bits per byte")
    add_legend(figure, panels)
    return figure


def _doubled(first: int, last: int) -> Iterable[int]:
    while first <= last:
        yield first
        first *= 2


def positions_table(study: Study, ablation: Ablation) -> pd.DataFrame:
    """By task and variant the mean bits per byte of the last bins up to the training length and up to the longest."""
    rows = []
    for task in shown_tasks(study, ablation):
        trained, longest = study.tasks[task].data.length, study.tasks[task].data.lengths[-1]
        means = _positions(study, ablation, task).groupby(["variant", "context", "position"])["bits_per_byte"].mean()
        for variant in shown_on(study, ablation, task):
            at = {
                "at the training length": means.get((variant, "full", trained)),
                "at the longest": means.get((variant, "full", longest)),
                "at the longest, sliding": means.get((variant, "sliding", longest)),
            }
            rows.append({"task": task, "variant": variant, **at})
    return pd.DataFrame(rows)


def _positions(study: Study, ablation: Ablation, task: str) -> pd.DataFrame:
    table = read_positions(task)
    return table[table["variant"].isin(shown_on(study, ablation, task)) & table["seed"].isin(study.seeds)]
