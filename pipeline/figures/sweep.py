"""The metric against a numeric setting of the variants."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

from pipeline.config.grid import shown_tasks
from pipeline.config.study import Ablation, Study
from pipeline.figures.base import AxisPlot, axis_value, trained_variants

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


class Sweep(AxisPlot):
    """One panel per task, one line per length. The value `full` is drawn at the training length."""

    caption = (
        "Score by a numeric setting of the variants, one line per test length. Where the lines part, a variant solves the"
        " training length but does not carry over to longer tests."
    )

    def place(self, study: Study, ablation: Ablation, variant: str) -> object:
        return axis_value(study, ablation, variant)

    def check_value(self, study: Study, ablation: Ablation, variant: str) -> Iterator[str]:
        value = axis_value(study, ablation, variant)
        if value is None:
            key = "reference_variants" if variant in ablation.reference_variants else "variants"
            settings = " and ".join(f"variants.{variant}.{key}" for key in ablation.x_keys)
            yield f"variant {variant!r} does not set it. Fix: set {settings}, or remove it from {key}"
        elif isinstance(value, bool) or not (isinstance(value, int | float) or value == "full"):
            yield f"a sweep needs numbers, but variant {variant!r} has {json.dumps(value)}"

    def draw(self, study: Study, ablation: Ablation, results: pd.DataFrame, references: pd.DataFrame) -> Figure:
        import seaborn as sns

        from pipeline.figures.drawing.axes import axis_label, draw_construction, label_axes
        from pipeline.figures.drawing.references import draw_levels
        from pipeline.figures.drawing.style import add_legend, errorbar, panels_of, set_ticks

        figure, panels = panels_of(shown_tasks(study, ablation))
        values = {v: axis_value(study, ablation, v) for v in trained_variants(study, ablation)}
        for task, axes in panels.items():
            length = study.tasks[task].data.length
            scores = results[(results["task"] == task) & results["multiple"].isin(study.evaluate.multiples)].copy()
            draw_construction(study, scores, axes)
            scores = scores[scores["variant"].isin(values)]
            numbers = {v: length if value == "full" else value for v, value in values.items()}
            scores["setting"] = scores["variant"].map(numbers).astype(float)
            scores["length"] = scores["multiple"].map(lambda multiple: f"at {multiple:g}x length")
            sns.lineplot(
                scores, x="setting", y="value", hue="length", style="length", markers=True, dashes=False, ax=axes,
                palette=sns.color_palette("colorblind", scores["length"].nunique()), errorbar=errorbar(study),
            )  # fmt: skip
            draw_levels(study, ablation, references[references["task"] == task], axes)
            axes.set_xscale("log", base=2)
            set_ticks(axes, sorted(set(scores["setting"])), "{:g}")
            full = f" ({length}: full length)" if "full" in values.values() else ""
            label_axes(study, task, axes, axis_label(ablation.x_keys) + full)
        add_legend(figure, panels)
        return figure
