"""The metric against a numeric setting of the variants."""

from __future__ import annotations

import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from pipeline.config.grid import shown_tasks, variant_value
from pipeline.config.study import Ablation, Study
from pipeline.figures.common import axis_label, draw_construction, label_axes, trained_variants
from pipeline.figures.style import add_legend, errorbar, panels_of, set_ticks


def sweep(study: Study, ablation: Ablation, results: pd.DataFrame) -> Figure:
    """One panel per task, one line per length. The value `full` is drawn at the training length."""
    figure, panels = panels_of(shown_tasks(study, ablation))
    assert ablation.x is not None
    values = {v: variant_value(study, v, ablation.x) for v in trained_variants(study, ablation)}
    for task, axes in panels.items():
        length = study.tasks[task].data.length
        scores = results[(results["task"] == task) & results["multiple"].isin(study.evaluate.multiples)].copy()
        draw_construction(study, scores, axes)
        scores = scores[scores["variant"].isin(values)]
        numbers = {v: length if value == "full" else value for v, value in values.items()}
        scores[ablation.x] = scores["variant"].map(numbers).astype(float)
        scores["length"] = scores["multiple"].map(lambda multiple: f"at {multiple:g}x length")
        sns.lineplot(
            scores, x=ablation.x, y="value", hue="length", style="length", markers=True, dashes=False, ax=axes,
            palette=sns.color_palette("colorblind", scores["length"].nunique()), errorbar=errorbar(study),
        )  # fmt: skip
        axes.set_xscale("log", base=2)
        set_ticks(axes, sorted(set(scores[ablation.x])), "{:g}")
        full = f" ({length}: full length)" if "full" in values.values() else ""
        label_axes(study, task, axes, axis_label(ablation.x) + full)
    add_legend(figure, panels)
    return figure
