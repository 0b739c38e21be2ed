"""The metric against a price of a variant: the state that it keeps, its parameters, or its measured time per training step."""

from __future__ import annotations

import functools
import math
import textwrap
from collections.abc import Mapping
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from cat.config import ModelConfig
from pipeline.config.grid import variants_on
from pipeline.config.study import Study
from pipeline.figures.drawing.axes import label_axes
from pipeline.figures.drawing.palette import COLOURS
from pipeline.figures.drawing.style import set_ticks
from pipeline.reporting.families import CAT, FAMILIES, family
from pipeline.reporting.labels import variant_label
from pipeline.storage import runs, training_log

MIN_GAIN = 0.005
"""Smallest gain in accuracy or bits that justifies a higher cost."""
STATE, PARAMETERS, SECONDS = "state size", "parameters without embeddings", "seconds per step"
LABELS = {STATE: "state size: numbers kept for the next token", PARAMETERS: PARAMETERS, SECONDS: "seconds per training step"}
"""Column of `cost_table` -> its label."""
COLUMNS, NAMES, NAME_WIDTH = 2, 3, 42
"""Panels per row; names per mark at most, and characters per line of them."""
MIN_SPAN = 4
"""Smallest ratio of the ends of an axis: smaller differences of a price do not matter."""
SAME_PRICE, SAME_SCORE = {STATE: 1.05, PARAMETERS: 1.05, SECONDS: 1.3}, 0.02
"""Largest ratio of prices and difference of scores between variants that share a mark; measured times are noisy."""


class Mark(NamedTuple):
    """Variants of one family at one place of a panel."""

    price: float
    value: float
    family: str
    variants: list[str]


def cost_table(study: Study, scores: pd.DataFrame) -> pd.DataFrame:
    """Prices per trained cell, and its mean metric at the longest length of the tables."""
    multiple = max(study.evaluate.multiples)
    means = scores[scores["multiple"] == multiple].groupby(["task", "variant"])["value"].mean()
    rows = []
    for task, section in study.tasks.items():
        trained, longest = section.data.length, round(section.data.length * multiple)
        for variant in variants_on(study, task):
            if isinstance(config := study.variants[variant], ModelConfig):
                value = means.get((task, variant), math.nan)
                rows.append((task, variant, state_size(config, trained, longest), parameters(config, trained), value))
    return pd.DataFrame(rows, columns=["task", "variant", STATE, PARAMETERS, "value"])


@functools.lru_cache(maxsize=1024)
def state_size(config: ModelConfig, trained: int, length: int) -> float:
    """Numbers in the caches of a model, trained at a length, after `length` tokens; nan if it cannot read them."""
    most = config.max_length(trained)
    if most is not None and length > most:
        return math.nan
    try:
        return _state_size(config, trained, length, "meta")  # has shapes but no values, so it takes no time
    except (NotImplementedError, RuntimeError):  # an operation of a mixer of your own may need values
        return _state_size(config, trained, length, "cpu")


def _state_size(config: ModelConfig, trained: int, length: int, device: str) -> int:
    import torch

    from cat.model import SequenceModel

    with torch.device(device), torch.random.fork_rng(devices=[]), torch.no_grad():
        _, caches = SequenceModel(config, vocabulary=2, length=trained).eval().step(torch.zeros(1, length, dtype=torch.long))
    return sum(tensor.numel() for cache in caches for tensor in cache.state.values())


@functools.lru_cache(maxsize=1024)
def parameters(config: ModelConfig, trained: int) -> int:
    """Parameters of a model, without the embeddings and the head, which depend on the vocabulary."""
    import torch

    from cat.model import SequenceModel

    with torch.device("meta"):
        model = SequenceModel(config, vocabulary=2, length=trained)
    return sum(weight.numel() for part in (model.blocks, model.norm) for weight in part.parameters())


def seconds_per_step(task: str, variant: str) -> float:
    """Mean measured time of a training step of a cell, with validation; nan for a cell that was restored from a cache."""
    log = training_log.read_log(task, variant)
    return log["seconds"] / sum(run["steps"] for run in runs.read_summary(task, variant)["runs"]) if log else math.nan


def cost(study: Study, costs: pd.DataFrame, price: str) -> Figure:
    """One panel per task with at least two marks. They have numbers, whose names stand beside the panel.

    A line joins the variants that are better than all cheaper ones.
    """
    known = costs.dropna(subset=[price, "value"])
    tables = {task: known[known["task"] == task].set_index("variant") for task in study.tasks}
    marks = {task: found for task, table in tables.items() if len(found := _marks(study, table, price)) > 1}
    columns = min(max(len(marks), 1), COLUMNS)
    rows = max(math.ceil(len(marks) / columns), 1)
    figure, grid = plt.subplots(rows, columns, squeeze=False, figsize=(8 * columns, 3.7 * rows), layout="constrained")
    for axes in grid.flat[len(marks) :]:
        axes.remove()
    for task, axes in zip(marks, grid.flat, strict=False):
        _draw_panel(study, task, tables[task], marks[task], axes, price)
    shown = {family(study.variants[variant]) for variant in known["variant"]}
    handles = [Line2D([], [], ls="none", marker="o", ms=9, color=_colour(name)) for name in FAMILIES if name in shown]
    labels = [words for name, words in FAMILIES.items() if name in shown]
    figure.legend(handles, labels, loc="outside upper center", ncols=columns * 2, frameon=False)
    return figure


def _draw_panel(study: Study, task: str, table: pd.DataFrame, marks: list[Mark], axes: Axes, price: str) -> None:
    better = 1 if study.tasks[task].data.goal == "accuracy" else -1
    front = pareto_front({str(v): (table[price][v], better * table["value"][v]) for v in table.index})
    axes.plot(table[price][front], table["value"][front], color="0.6", lw=1, zorder=0, drawstyle="steps-post")
    for number, mark in enumerate(marks, 1):
        axes.plot(mark.price, mark.value, "o", ms=12, color=_colour(mark.family), alpha=0.9)
        options: dict[str, Any] = {"color": "white", "fontsize": 8, "fontweight": "bold", "ha": "center", "va": "center_baseline"}
        axes.text(mark.price, mark.value, str(number), **options)
    low, high = table[price].min(), table[price].max()
    around = max(1.25, math.sqrt(MIN_SPAN * low / high))
    axes.set(xscale="log", xlim=(low / around, high * around))
    ticks = [digit * 10.0**exponent for exponent in range(-6, 12) for digit in (1, 2, 3, 5)]
    first, last = axes.get_xlim()
    set_ticks(axes, [tick for tick in ticks if first <= tick <= last], "{:g}" if price == SECONDS else "{:,.0f}")
    label_axes(study, task, axes, LABELS[price])
    numbers = [
        Line2D([], [], ls="none", marker=f"${number}$", ms=4 * len(str(number)) + 2, color=_colour(mark.family))
        for number, mark in enumerate(marks, 1)
    ]
    names = [_names(study, mark.variants) for mark in marks]
    axes.legend(numbers, names, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=9, handlelength=1)


def _marks(study: Study, table: pd.DataFrame, price: str) -> list[Mark]:
    """The variants of a task, cheapest first. Variants of one family at nearly the same place share a mark."""
    marks: list[Mark] = []
    ordered = table.sort_values([price, "value"], kind="stable")
    for variant, at, value in zip(map(str, ordered.index), ordered[price], ordered["value"], strict=True):
        new = Mark(at, value, family(study.variants[variant]), [variant])
        near = [mark for mark in marks if _same_place(mark, new, SAME_PRICE[price])]
        if near:
            near[0].variants.append(variant)
        else:
            marks.append(new)
    return marks


def _same_place(first: Mark, other: Mark, ratio: float) -> bool:
    near = other.price <= first.price * ratio and abs(other.value - first.value) <= SAME_SCORE
    return first.family == other.family and near


def _names(study: Study, variants: list[str]) -> str:
    names = [variant_label(study, variant) for variant in variants[:NAMES]]
    more = len(variants) - len(names)
    return textwrap.fill("; ".join(names) + (f" and {more} more" if more else ""), NAME_WIDTH)


def _colour(name: str) -> str:
    """The colour of a whole family: the strongest of its variants."""
    return COLOURS[name][1 if name == CAT else 0]


def pareto_front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Names of the points (price, merit) that are better by MIN_GAIN than all cheaper points, the cheapest first."""
    front: list[str] = []
    for name in sorted(points, key=lambda name: (points[name][0], -points[name][1])):
        if not front or points[name][1] > points[front[-1]][1] + MIN_GAIN:
            front.append(name)
    return front
