"""Curves that need not be told apart: variants that are no better than a partial strategy, and alike, are one pale line."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes

from pipeline.config.study import Study
from pipeline.figures.drawing.style import draw_line
from pipeline.reporting.diagnosis import AS_GOOD
from pipeline.reporting.labels import task_label, variant_label

ALIKE = 0.1
"""Largest difference of accuracy at any place between two curves of one group."""
COLOUR = "0.8"
DASHES = ("-", (0, (1.5, 0.8)), (0, (0.6, 0.6)))
"""Dash of each group of a panel; there are no more groups."""
LABEL_WIDTH = 48

Groups = list[list[str]]


def pale_groups(table: pd.DataFrame, limit: pd.Series | float, *, x: str) -> Groups:
    """Groups of at least two variants in `table` that are alike and nowhere above `limit`, which may depend on `x`.

    `table` has the accuracies in the column `value`. The group with the lowest curve comes first.
    """
    means = table.groupby([x, "variant"])["value"].mean().unstack("variant")
    above = means.sub(limit, axis=0) if isinstance(limit, pd.Series) else means - limit
    low = means.loc[:, (above <= AS_GOOD).all()]
    groups: Groups = []
    for variant in low.mean().sort_values(kind="stable").index:
        near = [group for group in groups if (low[variant] - low[group[0]]).abs().max() <= ALIKE]
        if near:
            near[0].append(str(variant))
        else:
            groups.append([str(variant)])
    return [group for group in groups if len(group) > 1][: len(DASHES)]


def draw_pale(study: Study, groups: Mapping[str, Groups], task: str, table: pd.DataFrame, axes: Axes, *, x: str) -> list[str]:
    """Draw the groups of a task in `groups`, task -> groups, and return their variants."""
    for number, group in enumerate(groups[task]):
        rows, label = table[table["variant"].isin(group)], _label(study, groups, number)
        look: dict[str, Any] = {"color": COLOUR, "linestyle": DASHES[number], "lw": 4, "zorder": 1.9}
        draw_line(study, rows, axes, x=x, y="value", label=label, alpha=0.5, **look)
    return [variant for group in groups[task] for variant in group]


def _label(study: Study, groups: Mapping[str, Groups], number: int) -> str:
    """The words of the legend for the groups with one dash: their variants, by task if tasks differ."""
    shown = {task: of_task[number] for task, of_task in groups.items() if len(of_task) > number}
    names = {task: _names(study, group) for task, group in shown.items()}
    if len({*names.values()}) == 1 and len(shown) == len(groups):
        parts = [f"no better than a partial strategy: {next(iter(names.values()))}"]
    else:
        parts = ["no better than a partial strategy", *(f"at {task_label(study, task)}: {text}" for task, text in names.items())]
    return "\n".join(textwrap.fill(part, LABEL_WIDTH) for part in parts)


def _names(study: Study, variants: Sequence[str]) -> str:
    return "; ".join(variant_label(study, variant) for variant in study.variants if variant in variants)
