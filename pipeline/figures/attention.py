"""Attention: entropy, and how much is on the answer."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from pipeline.config.grid import shown_on, shown_tasks
from pipeline.config.study import Ablation, Study


def attention(study: Study, ablation: Ablation, results: pd.DataFrame) -> Figure:
    """How much of the attention is on the answer's token, and how many tokens share it; of the layer with the most on it."""
    tasks = shown_tasks(study, ablation)
    figure, grid = plt.subplots(2, len(tasks), squeeze=False, figsize=(4.4 * len(tasks), 6.4), sharex="col")
    for task, column in zip(tasks, grid.T, strict=True):
        here = results[(results["task"] == task) & results["metric"].str.startswith("attention_")].copy()
        here[["metric", "layer"]] = here["metric"].str.rsplit("_", n=1, expand=True)
        by_layer = here.pivot_table(index=["variant", "layer"], columns="metric", values="value", aggfunc="mean")
        by_layer = by_layer.reindex(columns=["attention_on_answer", "attention_entropy"])
        best = by_layer["attention_on_answer"].fillna(0).groupby("variant").idxmax()
        here = here.set_index(["variant", "layer"]).loc[list(best)].reset_index()
        for metric, axes in zip(("attention_on_answer", "attention_entropy"), column, strict=True):
            shown = here[here["metric"] == metric]
            variants = shown_on(study, ablation, task)
            sns.stripplot(shown, x="variant", y="value", order=variants, ax=axes, color="C0", jitter=False, size=7, alpha=0.6)
            axes.tick_params(axis="x", rotation=45)
            axes.set(xlabel="", title=task)
        column[0].set(ylabel="attention on the answer's token", ylim=(-0.04, 1.04))
        if not by_layer["attention_on_answer"].notna().any():  # answers of text stand nowhere
            column[0].set_axis_off()
        column[1].set(ylabel="entropy of attention, nats", ylim=(-0.1, None))
    figure.tight_layout()
    return figure
