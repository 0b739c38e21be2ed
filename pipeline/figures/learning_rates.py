"""How often the filter that solves every length is found."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from pipeline.config.grid import shown_tasks
from pipeline.config.study import Ablation, Study
from pipeline.figures.style import add_legend, panels_of, set_ticks, style
from pipeline.reporting.tables import found


def learning_rates(study: Study, ablation: Ablation, results: pd.DataFrame) -> Figure:
    """By learning rate, the share of seeds whose key filter solves every length, and the mean accuracy on validation, dotted."""
    table = found(study, ablation)
    figure, panels = panels_of(shown_tasks(study, ablation))
    for task, axes in panels.items():
        for variant, here in table[table["task"] == task].groupby("variant", sort=False):
            looks = style(study, str(variant))
            axes.plot(here["learning rate"], here["found"] / here["runs"], label=variant, lw=1.8, **looks)
            axes.plot(here["learning rate"], here["validation accuracy"], color=looks["color"], ls=":", lw=1.2)
        axes.set_xscale("log")
        set_ticks(axes, study.tasks[task].training.learning_rates, "{:g}")
        axes.set(
            title=task,
            xlabel="learning rate",
            ylabel="share of seeds that found it,\ndotted: validation accuracy",
            ylim=(-0.04, 1.04),
        )
    add_legend(figure, panels)
    return figure
