"""The metric with and without convolution, by a setting of the variants."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.config.grid import shown_tasks
from pipeline.config.study import Ablation, Study
from pipeline.figures.base import AxisPlot, axis_value, trained_variants

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


class Contrast(AxisPlot):
    """One row of panels per task, one column per length; the setting `x` on the horizontal axis."""

    caption = (
        "Score by a setting of the variants, with and without convolution. The distance between the two marks of a setting is the"
        " gain of the convolution. Bars show the spread over seeds."
    )

    def place(self, study: Study, ablation: Ablation, variant: str) -> object:
        return axis_value(study, ablation, variant), study.variants[variant].has_convolution

    def draw(self, study: Study, ablation: Ablation, results: pd.DataFrame, references: pd.DataFrame) -> Figure:
        import matplotlib.pyplot as plt
        import seaborn as sns

        from pipeline.figures.drawing.axes import axis_label, draw_construction, label_axes, task_title
        from pipeline.figures.drawing.palette import COLOURS
        from pipeline.figures.drawing.references import draw_levels
        from pipeline.figures.drawing.style import add_legend, errorbar
        from pipeline.reporting.families import ATTENTION, CAT

        colours = {"no convolution": COLOURS[ATTENTION][0], "with convolution": COLOURS[CAT][1]}

        multiples, tasks = study.evaluate.multiples, shown_tasks(study, ablation)
        figure, grid = plt.subplots(
            len(tasks), len(multiples), squeeze=False, figsize=(5.2 * len(multiples), 3.4 * len(tasks)), sharex=True
        )
        variants = trained_variants(study, ablation)
        settings = {v: str(axis_value(study, ablation, v)) for v in study.variants if v in variants}
        groups = {v: "with convolution" if study.variants[v].has_convolution else "no convolution" for v in settings}
        for task, row in zip(tasks, grid, strict=True):
            for multiple, axes in zip(multiples, row, strict=True):
                scores = results[(results["task"] == task) & (results["multiple"] == multiple)].copy()
                draw_construction(study, scores, axes)
                scores = scores[scores["variant"].isin(settings)]
                scores["setting"], scores["group"] = scores["variant"].map(settings), scores["variant"].map(groups)
                sns.pointplot(
                    scores, x="setting", y="value", order=list(dict.fromkeys(settings.values())), ax=axes, linestyle="none",
                    hue="group", hue_order=list(colours), palette=colours,
                    markers=["o", "s"], dodge=0.3, errorbar=errorbar(study),
                )  # fmt: skip
                shown = references[(references["task"] == task) & (references["multiple"] == multiple)]
                draw_levels(study, ablation, shown, axes)
                label_axes(study, task, axes, axis_label(ablation.x_keys))
                axes.set_title(f"{task_title(study, task)}\nat {multiple:g}x the training length")
        figure.tight_layout()
        add_legend(figure, {str(index): axes for index, axes in enumerate(grid.flat)})
        return figure
