"""Bits per byte by position in the context."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

from cat.tasks.text import Text
from pipeline.config.grid import shown_on, shown_tasks
from pipeline.config.plots import Plot
from pipeline.config.study import Ablation, Study
from pipeline.reporting.labels import variant_label

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


class Positions(Plot):
    """One panel per task. Every point is a mean over the same bytes, at positions from half the test length to the test length.

    With marks: all tokens since the start of the window. Thin, from the training length on: a sliding window of the training
    length. With that window a longer text changes nothing, so the line is level.
    """

    caption = (
        "Bits per byte of the same bytes by position: a window of L tokens scores its second half. A line that falls to the right"
        " of the training length uses the longer context; one that rises does not carry over. Thin and level: a sliding window of"
        " the training length."
    )
    shows_references = True
    extra_plots: ClassVar = {}
    rows = "the rows of these variants with the metric bits_per_byte"

    def check(self, study: Study, ablation: Ablation) -> Iterator[str]:
        for task in shown_tasks(study, ablation):
            if not isinstance(study.tasks[task].data, Text):
                yield f"plot = {self.name} needs a text task, but task {task!r} is none"

    def draw(self, study: Study, ablation: Ablation, results: pd.DataFrame, references: pd.DataFrame) -> Figure:
        from pipeline.figures.drawing.axes import task_title
        from pipeline.figures.drawing.palette import style
        from pipeline.figures.drawing.references import draw_levels
        from pipeline.figures.drawing.style import add_legend, draw_line, panels_of, set_ticks

        figure, panels = panels_of(shown_tasks(study, ablation))
        for task, axes in panels.items():
            data = study.tasks[task].data
            for variant in shown_on(study, ablation, task):
                rows = results[(results["task"] == task) & (results["variant"] == variant)]
                if rows["value"].isna().all():
                    continue
                look, label = style(study, variant), variant_label(study, variant)
                draw_line(study, rows, axes, x="length", y="value", label=label, alpha=0.15, **look)
                level = rows.loc[rows["length"] == data.length, "value"].mean()
                axes.plot([data.length, data.lengths[-1]], [level, level], color=look["color"], ls=":", lw=1)
            draw_levels(study, ablation, references[references["task"] == task], axes)
            axes.set_xscale("log", base=2)
            set_ticks(axes, data.lengths, "{:g}")
            axes.axvline(data.length, color="0.6", lw=1, ls=":", zorder=0)
            axes.set(
                title=task_title(study, task),
                xlabel=f"tokens of context, half to all (thin: sliding window of {data.length})",
                ylabel="bits per byte",
            )
        add_legend(figure, panels)
        return figure
