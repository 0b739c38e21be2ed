"""Gains on answers that can be recalled."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from pipeline.config.grid import shown_on, shown_tasks, shown_variants
from pipeline.config.study import Ablation, Study
from pipeline.figures.style import add_legend, errorbar

CLASSES = {"recalled": "loss_recalled", "recalled, rare": "loss_recalled_rare", "others": "loss_others"}
"""Of answers, and the metric that is their loss."""
WORTH = 0.01
"""Nats a token from which a gain is one."""


def recall(study: Study, ablation: Ablation, results: pd.DataFrame) -> Figure:
    """What each variant gains on its reference, the ablation's first, on recalled answers and on others.

    A row a task, a column the training length and the longest; under each variant the share of its whole gain on recalled ones.
    """
    table, tasks = gains(study, ablation, results), shown_tasks(study, ablation)
    reference, *variants = shown_variants(ablation)
    figure, grid = plt.subplots(
        len(tasks), 2, squeeze=False, sharey="row", figsize=(1.5 * max(len(variants), 3) + 5, 3.8 * len(tasks)),
        layout="constrained",
    )  # fmt: skip
    for task, row in zip(tasks, grid, strict=True):
        data = study.tasks[task].data
        for length, axes in zip((data.length, data.lengths[-1]), row, strict=True):
            here = table[(table["task"] == task) & (table["length"] == length)]
            points = here.melt(id_vars="variant", value_vars=list(CLASSES), var_name="answers", value_name="gain").dropna()
            sns.pointplot(
                points, x="variant", y="gain", order=variants, hue="answers", hue_order=list(CLASSES), linestyle="none", ax=axes,
                palette=sns.color_palette("colorblind", len(CLASSES)), markers=["o", "D", "s"], dodge=0.4,
                errorbar=errorbar(study),
            )  # fmt: skip
            axes.axhline(0, color="0.5", lw=0.8, zorder=0)
            shares = [f"{variant}\n{_of_recalled(here[here['variant'] == variant])}" for variant in variants]
            axes.set_xticks(range(len(variants)), shares)
            axes.set(xlabel="", ylabel="", title=f"{task}, at {length} tokens")
            if legend := axes.get_legend():
                legend.remove()
        row[0].set_ylabel(f"gain on {reference}, nats a token")
    figure.supxlabel("and the share of its whole gain that is on recalled answers", fontsize="medium")
    add_legend(figure, {str(at): axes for at, axes in enumerate(grid.flat)})
    return figure


def gains(study: Study, ablation: Ablation, results: pd.DataFrame) -> pd.DataFrame:
    """By task, length, variant and seed: the loss of the reference less that of the variant, in nats an answer of each class.

    Also `all`, on all answers, and `of recalled`, the part of it that recalled ones contribute: their share times their gain.
    """
    keys = ["task", "length", "variant", "seed"]
    metrics = [*CLASSES.values(), "loss", "recalled_share"]
    here = results[results["task"].isin(shown_tasks(study, ablation)) & results["metric"].isin(metrics)]
    wide = here.pivot(index=keys, columns="metric", values="value").reset_index()
    reference, *variants = shown_variants(ablation)
    pairs = wide[wide["variant"].isin(variants)].merge(
        wide[wide["variant"] == reference], on=["task", "length", "seed"], suffixes=("", " of reference")
    )
    for name, metric in {**CLASSES, "all": "loss"}.items():
        pairs[name] = pairs[f"{metric} of reference"] - pairs[metric]
    pairs["of recalled"] = pairs["recalled_share"] * pairs["recalled"].fillna(0)
    return pairs[[*keys, "recalled_share", *CLASSES, "all", "of recalled"]]


def gains_table(study: Study, ablation: Ablation, results: pd.DataFrame) -> pd.DataFrame:
    """By task, variant and length the mean gains over seeds, and the share of the whole gain that is on recalled answers."""
    table = gains(study, ablation, results)
    rows = []
    for task in shown_tasks(study, ablation):
        data = study.tasks[task].data
        for variant in shown_on(study, ablation, task):
            for length in dict.fromkeys((data.length, data.lengths[-1])):
                here = table[(table["task"] == task) & (table["variant"] == variant) & (table["length"] == length)]
                if len(here):
                    means = here[["recalled_share", *CLASSES, "all"]].mean().rename({"recalled_share": "recalled answers"})
                    rows.append({"task": task, "variant": variant, "length": length, **means, "of the gain": _of_recalled(here)})
    return pd.DataFrame(rows)


def _of_recalled(gained: pd.DataFrame) -> str:
    """How much of a gain is on recalled answers; more than all of it where others lose."""
    gain = gained["all"].mean()
    return f"{gained['of recalled'].mean() / gain:.0%}" if gain > WORTH else "no gain"
