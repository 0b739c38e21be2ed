"""The metric with and without convolution, by a setting of the variants."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from pipeline.config.grid import shown_tasks, variant_value
from pipeline.config.study import Ablation, Study
from pipeline.figures.common import axis_label, draw_construction, label_axes, task_title, trained_variants
from pipeline.figures.style import add_legend, errorbar


def contrast(study: Study, ablation: Ablation, results: pd.DataFrame) -> Figure:
    """One row of panels per task, one column per length; the setting `x` on the horizontal axis."""
    multiples, tasks = study.evaluate.multiples, shown_tasks(study, ablation)
    figure, grid = plt.subplots(
        len(tasks), len(multiples), squeeze=False, figsize=(5.2 * len(multiples), 3.4 * len(tasks)), sharex=True
    )
    assert ablation.x is not None
    settings = {v: str(variant_value(study, v, ablation.x)) for v in study.variants if v in trained_variants(study, ablation)}
    groups = {v: "with convolution" if study.variants[v].has_convolution else "no convolution" for v in settings}
    for task, row in zip(tasks, grid, strict=True):
        for multiple, axes in zip(multiples, row, strict=True):
            scores = results[(results["task"] == task) & (results["multiple"] == multiple)].copy()
            draw_construction(study, scores, axes)
            scores = scores[scores["variant"].isin(settings)]
            scores["setting"], scores["group"] = scores["variant"].map(settings), scores["variant"].map(groups)
            sns.pointplot(
                scores, x="setting", y="value", order=list(dict.fromkeys(settings.values())), ax=axes, linestyle="none",
                hue="group", hue_order=["no convolution", "with convolution"], palette=sns.color_palette("colorblind", 2),
                markers=["o", "s"], dodge=0.3, errorbar=errorbar(study),
            )  # fmt: skip
            label_axes(study, task, axes, axis_label(ablation.x))
            axes.set_title(f"{task_title(study, task)}\nat {multiple:g}x the training length")
    figure.tight_layout()
    add_legend(figure, {str(index): axes for index, axes in enumerate(grid.flat)})
    return figure
