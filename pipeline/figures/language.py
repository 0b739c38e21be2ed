"""The figures and tables of what language models do along their context: bits by position, and the gain on recalled answers."""

from __future__ import annotations

from collections.abc import Iterable

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from pipeline.config.grid import variants_on
from pipeline.config.study import Ablation, Study, shown_tasks, shown_variants
from pipeline.figures.style import add_legend, draw_line, errorbar, panels_of, set_ticks
from pipeline.storage.results import read_positions

CLASSES = {"recalled": "loss_recalled", "recalled, rare": "loss_recalled_rare", "others": "loss_others"}
"""Of answers, and the metric that is their loss."""
WORTH = 0.01
"""Nats a token from which a gain is one."""


def positions(study: Study, ablation: Ablation, results: pd.DataFrame) -> Figure:
    """Bits per byte against the position in the longest test windows by variant, a panel a task.

    Solid where a model reads from the start; dashed, from the training length on, where its window slides along.
    """
    figure, panels = panels_of(shown_tasks(study, ablation))
    # Dashes tell windows here, not variants, so that colours must differ within the figure.
    colours = dict(zip(shown_variants(ablation), sns.color_palette("colorblind", len(shown_variants(ablation))), strict=True))
    for task, axes in panels.items():
        table, trained = _positions(study, ablation, task), study.tasks[task].data.length
        full, sliding = table["context"] == "full", (table["context"] == "sliding") & (table["position"] >= trained)
        for variant in _shown(study, ablation, task):
            for chosen, dash in ((full, "-"), (sliding, "--")):
                here = table[chosen & (table["variant"] == variant)]
                if len(here):  # a seed that diverged has none
                    draw_line(
                        study, here, axes, x="position", y="bits_per_byte", color=colours[variant], linestyle=dash,
                        label=variant if dash == "-" else None, band=0.15,
                    )  # fmt: skip
        axes.set_xscale("log", base=2)
        set_ticks(axes, _doubled(table["position"].min(), table["position"].max()), "{:g}")
        axes.axvline(trained, color="0.6", lw=1, ls=":", zorder=0)
        axes.set(title=task, xlabel=f"position; dashed: a window of {trained} slides along", ylabel="bits per byte")
    add_legend(figure, panels)
    return figure


def _doubled(first: int, last: int) -> Iterable[int]:
    while first <= last:
        yield first
        first *= 2


def positions_table(study: Study, ablation: Ablation) -> pd.DataFrame:
    """By task and variant the mean bits per byte of the last bins up to the training length and up to the longest."""
    rows = []
    for task in shown_tasks(study, ablation):
        trained, longest = study.tasks[task].data.length, study.tasks[task].data.lengths[-1]
        means = _positions(study, ablation, task).groupby(["variant", "context", "position"])["bits_per_byte"].mean()
        for variant in _shown(study, ablation, task):
            at = {
                "at the training length": means.get((variant, "full", trained)),
                "at the longest": means.get((variant, "full", longest)),
                "at the longest, sliding": means.get((variant, "sliding", longest)),
            }
            rows.append({"task": task, "variant": variant, **at})
    return pd.DataFrame(rows)


def _positions(study: Study, ablation: Ablation, task: str) -> pd.DataFrame:
    table = read_positions(task)
    return table[table["variant"].isin(_shown(study, ablation, task)) & table["seed"].isin(study.seeds)]


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
        for variant in _shown(study, ablation, task):
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


def _shown(study: Study, ablation: Ablation, task: str) -> list[str]:
    return [variant for variant in shown_variants(ablation) if variant in variants_on(study, task)]
