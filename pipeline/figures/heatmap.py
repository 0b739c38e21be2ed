"""Mean scores of variants by tasks."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from pipeline.config.grid import shown_tasks, shown_variants
from pipeline.config.study import Ablation, Study
from pipeline.figures.common import task_title
from pipeline.reporting.labels import variant_label, with_slug
from pipeline.reporting.tables import LABELS
from pipeline.storage.results import PRIMARY


def heatmap(study: Study, ablation: Ablation, results: pd.DataFrame) -> Figure:
    """One panel per metric and length, one row per variant, one column per task. Bright is better for both metrics."""
    groups: list[tuple[float, str, pd.DataFrame]] = []
    for goal, metric in PRIMARY.items():
        tasks = [task for task in shown_tasks(study, ablation) if study.tasks[task].data.goal == goal]
        for multiple in study.evaluate.multiples:
            scores = results[results["task"].isin(tasks) & (results["multiple"] == multiple)]
            if len(scores):
                means = scores.pivot_table(index="variant", columns="task", values="value", aggfunc="mean")
                groups.append((multiple, metric, means.reindex(index=shown_variants(ablation), columns=tasks)))
    labels = [with_slug(variant_label(study, variant), variant) for variant in shown_variants(ablation)]
    widths = [max(means.shape[1], 1.6) for _, _, means in groups]
    size = (1.1 * sum(widths) + 0.1 * max(map(len, labels)), 0.5 * len(labels) + 3.2)
    figure, panels = plt.subplots(1, len(groups), figsize=size, width_ratios=widths, squeeze=False, layout="constrained")
    bits = [means for _, metric, means in groups if metric == "bits_per_byte"]
    for axes, (multiple, metric, means) in zip(panels[0], groups, strict=True):
        low, high = (0, 1) if metric == "accuracy" else (min(b.min(axis=None) for b in bits), max(b.max(axis=None) for b in bits))
        colours = "cividis" if metric == "accuracy" else "cividis_r"
        sns.heatmap(means, vmin=low, vmax=high, cmap=colours, annot=True, fmt=".2f", cbar=False, linewidths=1, ax=axes)
        axes.set(xlabel="", ylabel="", title=f"{LABELS[metric]}\nat {multiple:g}x the\ntraining length")
        columns = [task_title(study, task) for task in means.columns]
        axes.set_xticks([index + 0.5 for index in range(len(columns))], columns, rotation=35, ha="right", rotation_mode="anchor")
        axes.set_yticks([index + 0.5 for index in range(len(labels))], labels if axes is panels[0][0] else [], rotation=0)
    return figure
