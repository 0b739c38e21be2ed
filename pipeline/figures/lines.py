"""The metric by evaluation length."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pipeline.config.grid import shown_tasks
from pipeline.config.plots import Plot
from pipeline.config.study import Ablation, Study

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


class Lines(Plot):
    """One panel per task, one line per variant."""

    caption = (
        "Score by test length. A line that stays level to the right of the dotted line, the training length, carries over to"
        " longer tests. Bands show the spread over seeds. Pale lines are variants that are no better than a partial strategy."
    )
    shows_references = True
    extra_plots: ClassVar = {"training": "training"}

    def draw(self, study: Study, ablation: Ablation, results: pd.DataFrame, references: pd.DataFrame) -> Figure:
        from pipeline.figures.drawing.axes import label_axes
        from pipeline.figures.drawing.pale import draw_pale
        from pipeline.figures.drawing.references import draw_by_length
        from pipeline.figures.drawing.style import add_legend, draw_lines, panels_of, set_ticks

        figure, panels = panels_of(shown_tasks(study, ablation))
        groups = {task: _pale(study, task, results, references) for task in panels}
        for task, axes in panels.items():
            data, rows = study.tasks[task].data, results[results["task"] == task]
            pale = draw_pale(study, groups, task, rows, axes, x="multiple")
            draw_lines(study, ablation, rows, axes, x="multiple", y="value", without=pale)
            draw_by_length(study, ablation, references[references["task"] == task], axes)
            axes.set_xscale("log", base=2)
            set_ticks(axes, data.multiples, "{:g}x")
            axes.axvline(1, color="0.6", lw=1, ls=":", zorder=0)
            longest = "longest " if len(data.training_lengths) > 1 else ""
            label_axes(study, task, axes, f"length / {longest}training length of {data.length}")
        add_legend(figure, panels)
        return figure


def _pale(study: Study, task: str, results: pd.DataFrame, references: pd.DataFrame) -> list[list[str]]:
    """The groups of variants on a task that are no better than a reference at any length."""
    from pipeline.figures.drawing.pale import pale_groups

    known = references[references["task"] == task]
    if study.tasks[task].data.goal != "accuracy" or not len(known):
        return []
    return pale_groups(results[results["task"] == task], known.groupby("multiple")["value"].max(), x="multiple")
