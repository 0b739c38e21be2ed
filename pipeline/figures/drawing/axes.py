"""Axis labels and reference lines that several figures share."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes

from cat.mixers.registry import ConstructionConfig
from pipeline.config.study import Study
from pipeline.reporting.labels import task_label, variant_label, with_slug
from pipeline.reporting.tables import LABELS
from pipeline.storage.tables import PRIMARY

KERNELS = {"conv_q": "Q", "conv_k": "K", "conv_v": "V"}
TITLE_WIDTH = 36
"""Characters per line of a title."""
AXIS_LABELS = {"position": "positional encoding"}


def axis_label(keys: Sequence[str]) -> str:
    """The axis label of keys of a variant that have the same value: `kernel size of Q and K`."""
    if all(key in KERNELS for key in keys):
        return f"kernel size of {_listed([KERNELS[key] for key in keys])}"
    return _listed([AXIS_LABELS.get(key, key.replace("_", " ")) for key in keys])


def _listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def task_title(study: Study, task: str) -> str:
    """`2-gram recall (nar)`."""
    return with_slug(task_label(study, task), task)


def wrap_label(study: Study, variant: str) -> str:
    """The name of a variant in lines that fit below its points."""
    return textwrap.fill(variant_label(study, variant), 16)


def draw_construction(study: Study, table: pd.DataFrame, axes: Axes) -> None:
    """Draw the score of the construction as a horizontal line."""
    values = table[table["variant"].map(lambda variant: isinstance(study.variants[variant], ConstructionConfig))]["value"]
    if len(values):
        axes.axhline(values.mean(), color="black", lw=1.4, ls=":", label="construction")


def label_axes(study: Study, task: str, axes: Axes, x: str) -> None:
    """Set the title and the axis labels, and remove the panel's own legend."""
    metric = PRIMARY[study.tasks[task].data.goal]
    axes.set(title=textwrap.fill(task_title(study, task), TITLE_WIDTH), xlabel=x, ylabel=LABELS[metric])
    if metric == "accuracy":
        axes.set_ylim(-0.04, 1.04)
    if legend := axes.get_legend():
        legend.remove()
