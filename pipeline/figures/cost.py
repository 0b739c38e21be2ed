"""The metric against cost."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pipeline.config.study import Study
from pipeline.figures.common import _label
from pipeline.figures.style import style

WORTH = 0.005
"""Accuracy, or bits, that is worth a higher price."""


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
