"""Share of seeds whose key filter solves every length, by learning rate."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from pipeline.config.grid import shown_tasks
from pipeline.config.study import Ablation, Study
from pipeline.figures.common import task_title
from pipeline.figures.style import add_legend, panels_of, set_ticks, style
from pipeline.reporting.labels import variant_label
from pipeline.reporting.tables import key_filter_table


def learning_rates(study: Study, ablation: Ablation, results: pd.DataFrame) -> Figure:
    """One panel per task; dotted lines show the mean validation accuracy."""
    table = key_filter_table(study, ablation)
    figure, panels = panels_of(shown_tasks(study, ablation))
    for task, axes in panels.items():
        for variant, rows in table[table["task"] == task].groupby("variant", sort=False):
            options, label = style(study, str(variant)), variant_label(study, str(variant))
            axes.plot(rows["learning rate"], rows["solve every length"] / rows["runs"], label=label, lw=1.8, **options)
            axes.plot(rows["learning rate"], rows["validation accuracy"], color=options["color"], ls=":", lw=1.2)
        axes.set_xscale("log")
        set_ticks(axes, sorted(set(table.loc[table["task"] == task, "learning rate"])), "{:g}")
        axes.set(
            title=task_title(study, task),
            xlabel="learning rate",
            ylabel="share of seeds that solve every length\n(dotted: validation accuracy)",
            ylim=(-0.04, 1.04),
        )
    add_legend(figure, panels)
    return figure
