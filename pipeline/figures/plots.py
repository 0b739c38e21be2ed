"""The figures of the study, each drawn from the one results table; an ablation names the kind of its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from cat.config import Theory
from cat.tasks.registry import Recall
from pipeline.config.grid import variants_on
from pipeline.config.study import Ablation, Study, shown_tasks, shown_variants
from pipeline.figures.example import attention_on, read_example
from pipeline.figures.language import positions, recall
from pipeline.figures.stability import by_rate
from pipeline.figures.style import Draw, add_legend, draw_lines, errorbar, panels_of, set_ticks, style
from pipeline.reporting.tables import LABELS, found
from pipeline.storage import runs
from pipeline.storage.results import PRIMARY, read_filters, read_history

LAGS = 16
"""Of a filter as long as the sequence, so many are drawn."""
WORTH = 0.005
"""Accuracy, or bits, that is worth a higher price."""


def figures_of(name: str, ablation: Ablation) -> dict[str, Draw]:
    """The figures of an ablation by the names of their files: its own, by length, and in training."""
    own: dict[str, Draw] = {
        "heatmap": heatmap,
        "sweep": sweep,
        "contrast": contrast,
        "lines": lengths,
        "attention": attention,
        "rates": rates,
        "stability": by_rate,
        "example": example,
        "filters": filters,
        "positions": positions,
        "recall": recall,
    }
    figures = {name: own[ablation.figure]}
    if ablation.looks_inside:
        return figures
    if ablation.figure != "lines":
        figures[f"{name}_length"] = lengths
    return {**figures, f"{name}_training": training}


def lengths(study: Study, ablation: Ablation, results: pd.DataFrame) -> Figure:
    """The metric against the evaluation length by variant, a panel a task."""
    figure, panels = panels_of(shown_tasks(study, ablation))
    for task, axes in panels.items():
        here = results[results["task"] == task]
        draw_lines(study, ablation, here, axes, x="multiple", y="value")
        axes.set_xscale("log", base=2)
        set_ticks(axes, study.tasks[task].data.multiples, "{:g}x")
        axes.axvline(1, color="0.6", lw=1, ls=":", zorder=0)
        _label(study, task, axes, f"length, in training lengths of {study.tasks[task].data.length}")
    add_legend(figure, panels)
    return figure


def training(study: Study, ablation: Ablation, results: pd.DataFrame) -> Figure:
    """The validation metric against the training step by variant, a panel a task."""
    figure, panels = panels_of(shown_tasks(study, ablation))
    for task, axes in panels.items():
        column = "valid_accuracy" if study.tasks[task].data.goal == "accuracy" else "valid_loss"
        tables = []
        for variant in [v for v in shown_variants(ablation) if v in variants_on(study, task)]:
            rate = runs.read_summary(task, variant)["learning_rate"]
            tables.append(read_history(study, task, variant, rate).assign(variant=variant))
        history = pd.concat(tables, ignore_index=True)
        # Seeds that stopped early keep their last value, or the mean over seeds would jump as they leave.
        history = history.pivot(index="step", columns=["variant", "seed"], values=column).ffill()
        history = history.melt(ignore_index=False, value_name="value").reset_index()
        draw_lines(study, ablation, history, axes, x="step", y="value", markers=False)
        _label(study, task, axes, "training step")
        axes.set_ylabel("validation accuracy" if column == "valid_accuracy" else "validation loss, nats a token")
    add_legend(figure, panels)
    return figure


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


def sweep(study: Study, ablation: Ablation, results: pd.DataFrame) -> Figure:
    """The metric against a number of the variants, a panel a task, a line a length; `full` stands at the training length."""
    figure, panels = panels_of(shown_tasks(study, ablation))
    assert ablation.x is not None
    for task, axes in panels.items():
        length = study.tasks[task].data.length
        numbers = {v: getattr(study.variants[v], ablation.x) for v in trained_variants(study, ablation)}
        here = results[(results["task"] == task) & results["multiple"].isin(study.evaluate.multiples)].copy()
        _limit(study, here, axes)
        here = here[here["variant"].isin(numbers)]
        here[ablation.x] = here["variant"].map({v: length if n == "full" else n for v, n in numbers.items()}).astype(float)
        here["at length"] = here["multiple"].map(lambda multiple: f"{multiple:g}x")
        sns.lineplot(
            here, x=ablation.x, y="value", hue="at length", style="at length", markers=True, dashes=False, ax=axes,
            palette=sns.color_palette("colorblind", here["at length"].nunique()), errorbar=errorbar(study),
        )  # fmt: skip
        axes.set_xscale("log", base=2)
        set_ticks(axes, sorted(set(here[ablation.x])), "{:g}")
        _label(
            study,
            task,
            axes,
            f"{ablation.x}: taps, the last as many as the sequence has" if "full" in numbers.values() else ablation.x,
        )
    add_legend(figure, panels)
    return figure


def contrast(study: Study, ablation: Ablation, results: pd.DataFrame) -> Figure:
    """The metric by a setting of the variants, filtered beside unfiltered; a row a task, a column a length."""
    multiples, tasks = study.evaluate.multiples, shown_tasks(study, ablation)
    figure, grid = plt.subplots(
        len(tasks), len(multiples), squeeze=False, figsize=(5.2 * len(multiples), 3.4 * len(tasks)), sharex=True
    )
    assert ablation.x is not None
    settings = {v: str(getattr(study.variants[v], ablation.x)) for v in study.variants if v in trained_variants(study, ablation)}
    for task, row in zip(tasks, grid, strict=True):
        for multiple, axes in zip(multiples, row, strict=True):
            here = results[(results["task"] == task) & (results["multiple"] == multiple)].copy()
            _limit(study, here, axes)
            here = here[here["variant"].isin(settings)]
            here[ablation.x] = here["variant"].map(settings)
            here["filters"] = here["variant"].map(
                {v: "with filters" if study.variants[v].filtered else "without" for v in settings}
            )
            sns.pointplot(
                here, x=ablation.x, y="value", order=list(dict.fromkeys(settings.values())), ax=axes, linestyle="none",
                hue="filters", hue_order=["without", "with filters"], palette=sns.color_palette("colorblind", 2),
                markers=["o", "s"], dodge=0.3, errorbar=errorbar(study),
            )  # fmt: skip
            _label(study, task, axes, ablation.x)
            axes.set_title(f"{task}, at {multiple:g}x the training length")
    panels = {str(i): axes for i, axes in enumerate(grid.flat)}
    figure.tight_layout()
    add_legend(figure, panels)
    return figure


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
            variants = [v for v in shown_variants(ablation) if v in variants_on(study, task)]
            sns.stripplot(shown, x="variant", y="value", order=variants, ax=axes, color="C0", jitter=False, size=7, alpha=0.6)
            axes.tick_params(axis="x", rotation=45)
            axes.set(xlabel="", title=task)
        column[0].set(ylabel="attention on the answer's token", ylim=(-0.04, 1.04))
        if not by_layer["attention_on_answer"].notna().any():  # answers of text stand nowhere
            column[0].set_axis_off()
        column[1].set(ylabel="entropy of attention, nats", ylim=(-0.1, None))
    figure.tight_layout()
    return figure


def rates(study: Study, ablation: Ablation, results: pd.DataFrame) -> Figure:
    """By learning rate, the share of seeds whose key filter solves every length, and the mean accuracy on validation, dotted."""
    table = found(study, ablation)
    figure, panels = panels_of(shown_tasks(study, ablation))
    for task, axes in panels.items():
        for variant, here in table[table["task"] == task].groupby("variant", sort=False):
            looks = style(study, str(variant))
            axes.plot(here["learning rate"], here["found"] / here["runs"], label=variant, lw=1.8, **looks)
            axes.plot(here["learning rate"], here["validation accuracy"], color=looks["color"], ls=":", lw=1.2)
        axes.set_xscale("log")
        set_ticks(axes, study.tasks[task].train.learning_rates, "{:g}")
        axes.set(
            title=task,
            xlabel="learning rate",
            ylabel="share of seeds that found it,\ndotted: validation accuracy",
            ylim=(-0.04, 1.04),
        )
    add_legend(figure, panels)
    return figure


def example(study: Study, ablation: Ablation, results: pd.DataFrame) -> Figure:
    """Where every question of one test sequence looks, a panel a variant; the token that holds the answer has a frame.

    Of the first seed that did not diverge; of a model with several layers and heads, where most is on the answers.
    """
    cells = [(t, v) for t in shown_tasks(study, ablation) for v in shown_variants(ablation) if v in variants_on(study, t)]
    figure, panels = plt.subplots(len(cells), 1, figsize=(11, 2.3 * len(cells)), squeeze=False, layout="constrained")
    for (task, variant), axes in zip(cells, panels[:, 0], strict=True):
        data = read_example(task)
        weights = attention_on(task, variant, study.seeds, data)
        title = f"{variant} on {task}"
        if weights is not None:
            rows = np.arange(len(weights))
            sns.heatmap(weights, vmin=0, vmax=1, cmap="Blues", ax=axes, cbar_kws={"label": "attention"})
            for row, source in zip(rows, data.sources, strict=True):
                axes.add_patch(Rectangle((float(source), float(row)), 1, 1, fill=False, edgecolor="C3", lw=1.4))
            title += f": {weights[rows, data.sources].mean():.2f} on the answers"
        names = _token_names(study, task, data.tokens)
        axes.set_xticks(np.arange(len(names)) + 0.5, names, rotation=90, fontsize=7)
        axes.set_yticks(np.arange(len(data.asked)) + 0.5, [names[at] for at in data.asked], rotation=0, fontsize=7)
        axes.set(title=title if weights is not None else f"{title}: every seed diverged", ylabel="question")
    panels[-1, 0].set_xlabel("what it reads: k, tokens of keys; v, values; a dot, filler")
    return figure


def _token_names(study: Study, task: str, tokens: Iterable[int]) -> list[str]:
    data = study.tasks[task].data
    assert isinstance(data, Recall)

    def name(token: int) -> str:
        if token == 0:
            return "start"
        if token <= data.keys:
            return f"k{token}"
        return f"v{token - data.keys}" if token <= data.keys + data.values else "."

    return [name(token) for token in tokens]


def filters(study: Study, ablation: Ablation, results: pd.DataFrame) -> Figure:
    """The taps of every filter as stems, a row a task and variant, a column a stream; the theorem's beside them.

    Each is divided by its largest tap, since attention takes up any factor; of long filters the first LAGS tokens back.
    """
    tables = {task: read_filters(task) for task in shown_tasks(study, ablation)}
    cells = [(t, v) for t in tables for v in trained_variants(study, ablation) if v in set(tables[t]["variant"])]
    theorems = [v for v in shown_variants(ablation) if isinstance(study.variants[v], Theory)]
    streams = ("q", "k", "v")
    rows = max(len(cells), 1)
    figure, grid = plt.subplots(
        rows, 3, figsize=(10.5, 2.1 * rows), squeeze=False, sharex=True, sharey=True, layout="constrained"
    )
    if not cells:
        grid[0, 0].set_title("no seed of any variant has ended with a filter")
    for (task, variant), row in zip(cells, grid, strict=bool(cells)):
        for stream, axes in zip(streams, row, strict=True):
            here = tables[task][(tables[task]["stream"] == stream) & (tables[task]["lag"] < LAGS)]
            prescribed = here[here["variant"].isin(theorems) & (here["seed"] == study.seeds[0])]
            _stems(axes, prescribed, -0.15, color="black", marker="x", linestyle=":", label="theorem")
            trained = here[(here["variant"] == variant) & here["seed"].isin(study.seeds)]
            _stems(
                axes, trained, 0.1, color=style(study, variant)["color"], marker="o", linestyle="-", label="trained, each seed"
            )
            axes.axhline(0, color="0.5", lw=0.8)
            axes.set_title(f"{variant} on {task}: {stream}" + ("" if len(trained) else ", no filter"))
    lags = pd.concat([table["lag"] for table in tables.values()])
    set_ticks(grid[0, 0], range(max(lags[lags < LAGS].max(), 1) + 1 if len(lags) else 2), "{:g}")
    for axes in grid[-1]:
        axes.set_xlabel("tokens back")
    for axes in grid[:, 0]:
        axes.set_ylabel("tap / largest tap")
    add_legend(figure, {str(at): axes for at, axes in enumerate(grid.flat)})
    return figure


def _stems(axes: Axes, taps: pd.DataFrame, shift: float, *, color: Any, marker: str, linestyle: str, label: str) -> None:
    """The filters of every layer, row and seed side by side."""
    for place, (_, one) in enumerate(taps.groupby(["variant", "layer", "row", "seed"], sort=True)):
        largest = one["value"].iloc[one["value"].abs().argmax()]
        heights = one["value"] / largest if largest else one["value"]
        at = one["lag"] + shift + 0.08 * place
        for x, height in zip(at, heights, strict=True):
            axes.plot([x, x], [0, height], linestyle, color=color, lw=1.6)
        axes.plot(at, heights, marker, color=color, ms=5, label=label if place == 0 else None)


def cost(study: Study, costs: pd.DataFrame) -> Figure:
    """The metric against parameters and seconds a run; a row a task, a column a price, the variants that pay joined by a line."""
    tasks = list(dict.fromkeys(costs["task"]))
    figure, grid = plt.subplots(len(tasks), 2, squeeze=False, figsize=(11, 3.3 * len(tasks)), layout="constrained")
    for task, row in zip(tasks, grid, strict=True):
        here = costs[costs["task"] == task].set_index("variant")
        better = 1 if study.tasks[task].data.goal == "accuracy" else -1
        for axes, price in zip(row, ("parameters", "seconds a run"), strict=True):
            known = here.dropna(subset=[price, "value"])
            front = pareto_front({str(v): (known[price][v], better * known["value"][v]) for v in known.index})
            for variant, x, y in zip(known.index, known[price], known["value"], strict=True):
                looks = {**style(study, str(variant)), "linestyle": "none"}
                axes.plot(x, y, ms=6, alpha=1 if variant in front else 0.35, **looks)
            axes.plot(known[price][front], known["value"][front], color="0.4", lw=1, zorder=0, drawstyle="steps-post")
            for place, variant in enumerate(front):
                at = (known[price][variant], known["value"][variant])
                axes.annotate(variant, at, xytext=(5, 5 if place % 2 else -11), textcoords="offset points", fontsize=8)
            _label(study, task, axes, price if len(known) else f"{price}: not measured here")
            axes.xaxis.set_major_locator(MaxNLocator(4))
            axes.xaxis.set_major_formatter("{x:,.0f}" if price == "parameters" else "{x:g}")
            axes.margins(x=0.12)
            axes.set_title(task)
    return figure


def pareto_front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Names of the points (price, merit) that are better by WORTH than all that cost less, the cheapest first."""
    front: list[str] = []
    for name in sorted(points, key=lambda name: (points[name][0], -points[name][1])):
        if not front or points[name][1] > points[front[-1]][1] + WORTH:
            front.append(name)
    return front


def trained_variants(study: Study, ablation: Ablation) -> list[str]:
    """The variants of the figure without those of a theorem, which have no place on an axis."""
    return [v for v in shown_variants(ablation) if not isinstance(study.variants[v], Theory)]


def _limit(study: Study, table: pd.DataFrame, axes: Axes) -> None:
    """What a theorem's weights reach, as a line across."""
    values = table[table["variant"].map(lambda variant: isinstance(study.variants[variant], Theory))]["value"]
    if len(values):
        axes.axhline(values.mean(), color="black", lw=1.4, ls=":", label="theory")


def _label(study: Study, task: str, axes: Axes, x: str) -> None:
    metric = PRIMARY[study.tasks[task].data.goal]
    axes.set(title=task, xlabel=x, ylabel=LABELS[metric])
    if metric == "accuracy":
        axes.set_ylim(-0.04, 1.04)
    if legend := axes.get_legend():
        legend.remove()
