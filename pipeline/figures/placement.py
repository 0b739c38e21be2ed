"""Scores of variants by tasks, beside their costs."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from cat.config import ModelConfig
from pipeline.config.grid import shown_on, shown_tasks, shown_variants
from pipeline.config.plots import Plot
from pipeline.config.study import Ablation, Study
from pipeline.reporting.labels import variant_label, with_slug

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ADDED, PER_TOKEN, PER_SEQUENCE = "parameters\nadded", "cache\nper token", "cache per\nsequence"


class Placement(Plot):
    """One panel per metric and length as in a heatmap, then the cost of each variant beside that of the first.

    The cost is that on the first task of the figure that trains the variant. Times are only in the HTML report, because they
    differ from run to run.
    """

    caption = (
        "Mean score over seeds of each variant (row) on each task (column); brighter is better. Right: parameters beyond those of"
        " the first variant, and numbers in the cache for generation, for each token and for each sequence. Look for bright rows"
        " with small costs."
    )

    def check(self, study: Study, ablation: Ablation) -> Iterator[str]:
        first = shown_variants(ablation)[0]
        if not isinstance(study.variants[first], ModelConfig):
            yield f"plot = {self.name} compares costs with those of the first variant, but {first!r} is not trained"
            return
        for task in shown_tasks(study, ablation):
            if shown_on(study, ablation, task) and first not in shown_on(study, ablation, task):
                yield f"plot = {self.name} compares costs with those of {first!r}, which is not trained on {task!r}"

    def draw(self, study: Study, ablation: Ablation, results: pd.DataFrame, references: pd.DataFrame) -> Figure:
        import matplotlib.pyplot as plt

        from pipeline.figures.drawing.axes import task_title
        from pipeline.figures.drawing.scores import mean_scores
        from pipeline.reporting.tables import LABELS

        groups, costs = list(mean_scores(study, ablation, results)), cost_columns(study, ablation)
        labels = [with_slug(variant_label(study, variant), variant) for variant in shown_variants(ablation)]
        widths = [max(means.shape[1], 2.0) for *_, means in groups] + [costs.shape[1] * 1.25]
        size = (0.8 * sum(widths) + 0.09 * max(map(len, labels)), 0.36 * len(labels) + 3)
        figure, panels = plt.subplots(1, len(widths), figsize=size, width_ratios=widths, squeeze=False, layout="constrained")
        bits = [means for metric, _, means in groups if metric == "bits_per_byte"]
        for axes, (metric, multiple, means) in zip(panels[0], groups, strict=False):
            low, high, colours = 0.0, 1.0, "cividis"
            if metric == "bits_per_byte":
                low, high, colours = min(b.min(axis=None) for b in bits), max(b.max(axis=None) for b in bits), "cividis_r"
            _draw_table(axes, means, labels if axes is panels[0][0] else [], form="{:.2f}", vmin=low, vmax=high, cmap=colours)
            axes.set_title(f"{LABELS[metric]}\nat {multiple:g}x the\ntraining length")
            _label_columns(axes, [textwrap.fill(task_title(study, task), 28) for task in means])
        _draw_table(panels[0][-1], costs, [], form="{:,.0f}", cmap=["white"])
        panels[0][-1].set_title("cost")
        _label_columns(panels[0][-1], [*costs])
        return figure

    def tables(self, study: Study, ablation: Ablation, results: pd.DataFrame) -> Iterator[str]:
        costs = cost_columns(study, ablation).rename(columns=lambda name: name.replace("\n", " "))
        costs.index = [with_slug(variant_label(study, variant), variant) for variant in costs.index]
        yield costs.rename_axis("variant").to_markdown(floatfmt=",.0f", missingval="-")

    def timed_tables(self, study: Study, ablation: Ablation) -> Iterator[str]:
        times = step_times(study, ablation)
        if times.notna().any(axis=None):
            times.index = [with_slug(variant_label(study, variant), variant) for variant in times.index]
            yield f"Time per training step, relative to {times.index[0]}, as far as the runs were measured here:"
            yield times.rename_axis("variant").to_markdown(floatfmt=".2f", missingval="-")


def cost_columns(study: Study, ablation: Ablation) -> pd.DataFrame:
    """Parameters added and numbers in the cache, one row per variant; nan for constructions."""
    import pandas as pd

    from pipeline.storage import runs

    rows: dict[str, list[float]] = {}
    first = shown_variants(ablation)[0]
    for variant in shown_variants(ablation):
        task = next((task for task in shown_tasks(study, ablation) if variant in shown_on(study, ablation, task)), None)
        config = study.variants[variant]
        if task is None or not isinstance(config, ModelConfig):
            rows[variant] = [float("nan")] * 3
            continue
        added = runs.read_summary(task, variant)["parameters"] - runs.read_summary(task, first)["parameters"]
        rows[variant] = [added, *_cache_size(config, study.tasks[task].data.length)]
    return pd.DataFrame.from_dict(rows, orient="index", columns=[ADDED, PER_TOKEN, PER_SEQUENCE], dtype=float)


def _cache_size(config: ModelConfig, length: int) -> tuple[float, float]:
    """Numbers that generation caches: for each further token, and for a sequence whatever its length.

    Measured after `length` tokens and one more, so that every kernel has all its inputs.
    """
    from pipeline.figures.drawing.cost import state_size

    size = state_size(config, length, length)
    per_token = state_size(config, length, length + 1) - size
    return per_token, size - length * per_token


def step_times(study: Study, ablation: Ablation) -> pd.DataFrame:
    """Seconds per training step relative to the first variant, variants by tasks; nan where no training was measured here."""
    import pandas as pd

    from pipeline.figures.drawing.cost import seconds_per_step

    times = pd.DataFrame(index=shown_variants(ablation), columns=shown_tasks(study, ablation), dtype=float)
    for task in times:
        for variant in shown_on(study, ablation, task):
            if isinstance(study.variants[variant], ModelConfig):
                times.loc[variant, task] = seconds_per_step(task, variant)
    return times / times.iloc[0]


def _draw_table(axes: Axes, table: pd.DataFrame, labels: list[str], *, form: str, **colours: Any) -> None:
    """Draw numbers on coloured cells, and leave cells without a number blank."""
    import seaborn as sns

    texts = table.map(lambda value: "" if math.isnan(value) else form.format(value))
    sns.heatmap(table, annot=texts, fmt="", annot_kws={"size": 9}, cbar=False, linewidths=1, ax=axes, **colours)
    axes.set(xlabel="", ylabel="")
    axes.grid(visible=False)
    axes.set_yticks([index + 0.5 for index in range(len(table))] if labels else [], labels, rotation=0)


def _label_columns(axes: Axes, labels: list[str]) -> None:
    axes.set_xticks([index + 0.5 for index in range(len(labels))], labels, rotation=35, ha="right", rotation_mode="anchor")
