"""Loss differences on targets that can be recalled from the context, and on others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

from cat.tasks.text import Text
from pipeline.config.grid import shown_on, shown_tasks, shown_variants, variants_on
from pipeline.config.plots import Plot
from pipeline.config.study import Ablation, Study
from pipeline.reporting.labels import variant_label

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

CLASSES = {"recalled": "loss_recalled", "recalled, rare": "loss_recalled_rare", "others": "loss_others"}
"""Class of targets -> the metric of its loss."""
MIN_GAIN = 0.01
"""Smallest difference in loss, in nats per token, that counts as a gain."""


class RecallGains(Plot):
    """The gain of each variant over the reference (the ablation's first variant), per class of targets.

    One row of panels per task; columns: the training length and the longest. Below each variant: the share of its whole gain
    that recalled targets contribute.
    """

    caption = (
        "Gain over the first variant, per class of targets. A high mark of recalled targets and a low one of others: the gain"
        " comes from recall."
    )
    uses_metrics = True
    shows_models = True
    extra_plots: ClassVar = {}
    rows = "the rows of these variants with the metric recalled_share or a metric that starts with loss"

    def check(self, study: Study, ablation: Ablation) -> Iterator[str]:
        tasks, variants = shown_tasks(study, ablation), shown_variants(ablation)
        for task in tasks:
            data = study.tasks[task].data
            if not isinstance(data, Text):
                yield f"plot = {self.name} needs a text task, but task {task!r} is none"
            elif data.ngram is None:
                yield f"plot = {self.name} needs tasks.{task}.data.ngram, which defines the answers that can be recalled"
        if len(variants) == 1:
            yield f"plot = {self.name} compares variants with the first, so it needs at least two"
        for task in tasks if variants else ():
            if variants[0] not in variants_on(study, task):
                yield f"plot = {self.name} compares with {variants[0]!r}, which is not trained on {task!r}"

    def draw(self, study: Study, ablation: Ablation, results: pd.DataFrame, references: pd.DataFrame) -> Figure:
        import matplotlib.pyplot as plt
        import seaborn as sns

        from pipeline.figures.drawing.axes import task_title, wrap_label
        from pipeline.figures.drawing.style import add_legend, errorbar

        table, tasks = gains(study, ablation, results), shown_tasks(study, ablation)
        reference, *variants = shown_variants(ablation)
        figure, grid = plt.subplots(
            len(tasks), 2, squeeze=False, sharey="row", figsize=(1.5 * max(len(variants), 3) + 5, 3.8 * len(tasks)),
            layout="constrained",
        )  # fmt: skip
        for task, row in zip(tasks, grid, strict=True):
            data = study.tasks[task].data
            for length, axes in zip((data.length, data.lengths[-1]), row, strict=True):
                rows = table[(table["task"] == task) & (table["length"] == length)]
                points = rows.melt(id_vars="variant", value_vars=list(CLASSES), var_name="targets", value_name="gain").dropna()
                sns.pointplot(
                    points, x="variant", y="gain", order=variants, hue="targets", hue_order=list(CLASSES), linestyle="none",
                    palette=sns.color_palette("colorblind", len(CLASSES)), markers=["o", "D", "s"], dodge=0.4, ax=axes,
                    errorbar=errorbar(study),
                )  # fmt: skip
                axes.axhline(0, color="0.5", lw=0.8, zorder=0)
                labels = [f"{wrap_label(study, v)}\n{_recalled_share(rows[rows['variant'] == v])}" for v in variants]
                axes.set_xticks(range(len(variants)), labels, fontsize="small")
                axes.set(xlabel="", ylabel="", title=f"{task_title(study, task)}, {length} tokens")
                if legend := axes.get_legend():
                    legend.remove()
            row[0].set_ylabel(f"gain over {variant_label(study, reference)},\nnats per token")
        figure.supxlabel("percentage: share of the variant's whole gain that recalled targets contribute", fontsize="medium")
        add_legend(figure, {str(index): axes for index, axes in enumerate(grid.flat)})
        return figure

    def tables(self, study: Study, ablation: Ablation, results: pd.DataFrame) -> Iterator[str]:
        from pipeline.reporting.tables import as_markdown, with_labels

        yield as_markdown(with_labels(study, gains_table(study, ablation, results)))


def gains(study: Study, ablation: Ablation, results: pd.DataFrame) -> pd.DataFrame:
    """The loss of the reference minus that of the variant, per task, length, variant and seed, in nats per target.

    Has a column per class of targets and `all`. `from recalled` is the part of `all` that recalled targets contribute: their
    share times their gain.
    """
    keys = ["task", "length", "variant", "seed"]
    metrics = [*CLASSES.values(), "loss", "recalled_share"]
    losses = results[results["task"].isin(shown_tasks(study, ablation)) & results["metric"].isin(metrics)]
    wide = losses.pivot(index=keys, columns="metric", values="value").reset_index()
    reference, *variants = shown_variants(ablation)
    pairs = wide[wide["variant"].isin(variants)].merge(
        wide[wide["variant"] == reference], on=["task", "length", "seed"], suffixes=("", " of reference")
    )
    for name, metric in {**CLASSES, "all": "loss"}.items():
        pairs[name] = pairs[f"{metric} of reference"] - pairs[metric]
    pairs["from recalled"] = pairs["recalled_share"] * pairs["recalled"].fillna(0)
    return pairs[[*keys, "recalled_share", *CLASSES, "all", "from recalled"]]


def gains_table(study: Study, ablation: Ablation, results: pd.DataFrame) -> pd.DataFrame:
    """Mean gains over seeds per task, variant and length, and the share of the whole gain from recalled targets."""
    import pandas as pd

    table = gains(study, ablation, results)
    rows = []
    for task in shown_tasks(study, ablation):
        data = study.tasks[task].data
        for variant in shown_on(study, ablation, task):
            for length in dict.fromkeys((data.length, data.lengths[-1])):
                seeds = table[(table["task"] == task) & (table["variant"] == variant) & (table["length"] == length)]
                if len(seeds):
                    means = seeds[["recalled_share", *CLASSES, "all"]].mean().rename({"recalled_share": "recalled targets"})
                    key = {"task": task, "variant": variant, "length": length}
                    rows.append({**key, **means, "share of gain": _recalled_share(seeds)})
    return pd.DataFrame(rows)


def _recalled_share(seeds: pd.DataFrame) -> str:
    """The share of the mean gain from recalled targets; above 100 % if other targets lose."""
    gain = seeds["all"].mean()
    return f"{seeds['from recalled'].mean() / gain:.0%}" if gain > MIN_GAIN else "no gain"
