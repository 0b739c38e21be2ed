"""Variants by tasks."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from pipeline.config.grid import shown_tasks, shown_variants
from pipeline.config.study import Ablation, Study
from pipeline.reporting.tables import LABELS
from pipeline.storage.results import PRIMARY


def heatmap(study: Study, ablation: Ablation, results: pd.DataFrame) -> Figure:
    """Variants by tasks, a panel a length; tasks that are scored in bits have panels of their own, dark for good as well."""
    groups: list[tuple[float, str, pd.DataFrame]] = []
    for goal, metric in PRIMARY.items():
        tasks = [task for task in shown_tasks(study, ablation) if study.tasks[task].data.goal == goal]
        for multiple in study.evaluate.multiples:
            here = results[results["task"].isin(tasks) & (results["multiple"] == multiple)]
            if len(here):
                values = here.pivot_table(index="variant", columns="task", values="value", aggfunc="mean")
                groups.append((multiple, metric, values.reindex(index=shown_variants(ablation), columns=tasks)))
    widths = [group[2].shape[1] + 0.8 for group in groups]
    figure, panels = plt.subplots(
        1, len(groups), figsize=(1.1 * sum(widths), 0.5 * len(shown_variants(ablation)) + 1.4), width_ratios=widths, squeeze=False
    )
    for axes, (multiple, metric, values) in zip(panels[0], groups, strict=True):
        bits = [g[2] for g in groups if g[1] == "bits_per_byte"]
        low, high = (0, 1) if metric == "accuracy" else (min(b.min(axis=None) for b in bits), max(b.max(axis=None) for b in bits))
        colours = "cividis" if metric == "accuracy" else "cividis_r"
        sns.heatmap(values, vmin=low, vmax=high, cmap=colours, annot=True, fmt=".2f", cbar=False, linewidths=1, ax=axes)
        axes.set(xlabel="", ylabel="", title=f"{LABELS[metric]}\nat {multiple:g}x the\ntraining length")
        axes.tick_params(axis="y", rotation=0)
        if axes is not panels[0][0]:
            axes.set_yticklabels([])
    figure.tight_layout()
    return figure
