"""The metric by evaluation length."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from pipeline.config.grid import shown_tasks
from pipeline.config.study import Ablation, Study
from pipeline.figures.common import label_axes
from pipeline.figures.style import add_legend, draw_lines, panels_of, set_ticks


def lengths(study: Study, ablation: Ablation, results: pd.DataFrame) -> Figure:
    """One panel per task, one line per variant."""
    figure, panels = panels_of(shown_tasks(study, ablation))
    for task, axes in panels.items():
        draw_lines(study, ablation, results[results["task"] == task], axes, x="multiple", y="value")
        axes.set_xscale("log", base=2)
        set_ticks(axes, study.tasks[task].data.multiples, "{:g}x")
        axes.axvline(1, color="0.6", lw=1, ls=":", zorder=0)
        data = study.tasks[task].data
        longest = "longest " if len(data.training_lengths) > 1 else ""
        label_axes(study, task, axes, f"length / {longest}training length of {data.length}")
    add_legend(figure, panels)
    return figure
