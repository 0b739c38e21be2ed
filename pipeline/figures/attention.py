"""Attention on the answer's token, and entropy of attention."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pipeline.config.grid import shown_on, shown_tasks, shown_variants
from pipeline.config.plots import Plot
from pipeline.config.study import Ablation, Study
from pipeline.reporting.labels import variant_label

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


class AttentionWeights(Plot):
    """Two panels per task, one point per seed, for the layer with the most attention on the answer's token."""

    caption = (
        "Attention on the token of the answer, and entropy of the attention, one point per seed. Near 1, the model attends to the"
        " answer; the lower the entropy, the fewer tokens it attends to."
    )
    uses_metrics = True

    def check(self, study: Study, ablation: Ablation) -> Iterator[str]:
        for variant in shown_variants(ablation):
            if not study.variants[variant].has_attention:
                yield f"plot = {self.name} needs attention weights, but variant {variant!r} has none"

    def draw(self, study: Study, ablation: Ablation, results: pd.DataFrame, references: pd.DataFrame) -> Figure:
        import matplotlib.pyplot as plt
        import seaborn as sns

        from pipeline.figures.drawing.axes import task_title

        tasks = shown_tasks(study, ablation)
        figure, grid = plt.subplots(
            2, len(tasks), squeeze=False, figsize=(4.4 * len(tasks), 7), sharex="col", layout="constrained"
        )
        for task, column in zip(tasks, grid.T, strict=True):
            scores = results[(results["task"] == task) & results["metric"].str.startswith("attention_")].copy()
            scores[["metric", "layer"]] = scores["metric"].str.rsplit("_", n=1, expand=True)
            by_layer = scores.pivot_table(index=["variant", "layer"], columns="metric", values="value", aggfunc="mean")
            by_layer = by_layer.reindex(columns=["attention_on_answer", "attention_entropy"])
            best = by_layer["attention_on_answer"].fillna(0).groupby("variant").idxmax()
            scores = scores.set_index(["variant", "layer"]).loc[list(best)].reset_index()
            variants = shown_on(study, ablation, task)
            for metric, axes in zip(("attention_on_answer", "attention_entropy"), column, strict=True):
                of_metric = scores[scores["metric"] == metric]
                sns.stripplot(
                    of_metric, x="variant", y="value", order=variants, ax=axes, color="C0", jitter=False, size=7, alpha=0.6
                )
                labels = [variant_label(study, variant) for variant in variants]
                axes.set_xticks(range(len(variants)), labels, rotation=35, ha="right", rotation_mode="anchor")
                axes.set(xlabel="", title="")
            column[0].set(ylabel="attention on\nthe answer's token", ylim=(-0.04, 1.04))
            column[0].set_title(task_title(study, task))
            if not by_layer["attention_on_answer"].notna().any():  # the next token of a text has no position in the input
                column[0].remove()
                column[1].set_title(task_title(study, task))
            column[1].set(ylabel="attention entropy,\nnats", ylim=(-0.1, None))
        return figure
