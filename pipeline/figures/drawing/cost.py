"""The metric against the cost of a variant: its parameters, or its measured training time."""

from __future__ import annotations

import math
from collections.abc import Mapping

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cat.mixers.registry import ConstructionConfig
from pipeline.config.grid import variants_on
from pipeline.config.study import Study
from pipeline.figures.drawing.axes import label_axes
from pipeline.figures.drawing.palette import style
from pipeline.reporting.labels import variant_label
from pipeline.storage import runs

MIN_GAIN = 0.005
"""Smallest gain in accuracy or bits that justifies a higher cost."""
PARAMETERS, SECONDS = "parameters", "seconds per run"
COLUMNS = 3


def cost_table(study: Study, scores: pd.DataFrame) -> pd.DataFrame:
    """Parameters per trained cell, and its mean metric at the longest length of the tables."""
    longest = scores[scores["multiple"] == max(study.evaluate.multiples)]
    means = longest.groupby(["task", "variant"])["value"].mean()
    rows = [
        (task, variant, runs.read_summary(task, variant)["parameters"], means.get((task, variant), math.nan))
        for task in study.tasks
        for variant in variants_on(study, task)
        if not isinstance(study.variants[variant], ConstructionConfig)
    ]
    return pd.DataFrame(rows, columns=["task", "variant", PARAMETERS, "value"])


def cost(study: Study, costs: pd.DataFrame, price: str) -> Figure:
    """One panel per task. A line joins the variants that are better than all cheaper ones; only these have a label."""
    tasks = list(dict.fromkeys(costs["task"]))
    rows, columns = math.ceil(len(tasks) / COLUMNS), min(len(tasks), COLUMNS)
    figure, grid = plt.subplots(rows, columns, squeeze=False, figsize=(5.5 * columns, 3.6 * rows), layout="constrained")
    for axes in grid.flat[len(tasks) :]:
        axes.set_axis_off()
    for task, axes in zip(tasks, grid.flat, strict=False):
        better = 1 if study.tasks[task].data.goal == "accuracy" else -1
        known = costs[costs["task"] == task].set_index("variant").dropna(subset=[price, "value"])
        front = pareto_front({str(v): (known[price][v], better * known["value"][v]) for v in known.index})
        for variant, x, y in zip(known.index, known[price], known["value"], strict=True):
            options = {**style(study, str(variant)), "linestyle": "none"}
            axes.plot(x, y, ms=6, alpha=1 if variant in front else 0.35, **options)
        axes.plot(known[price][front], known["value"][front], color="0.4", lw=1, zorder=0, drawstyle="steps-post")
        for index, variant in enumerate(front):
            axes.annotate(
                variant_label(study, variant),
                (known[price][variant], known["value"][variant]),
                xytext=(5, 5 if index % 2 else -11),
                textcoords="offset points",
                fontsize=8,
            )
        label_axes(study, task, axes, price if len(known) else f"{price}: not measured here")
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter("{x:,.0f}" if price == PARAMETERS else "{x:g}")
        axes.margins(x=0.12)
    return figure


def pareto_front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Names of the points (price, merit) that are better by MIN_GAIN than all cheaper points, the cheapest first."""
    front: list[str] = []
    for name in sorted(points, key=lambda name: (points[name][0], -points[name][1])):
        if not front or points[name][1] > points[front[-1]][1] + MIN_GAIN:
            front.append(name)
    return front
