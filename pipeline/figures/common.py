"""Axis labels and reference lines that several figures share."""

from __future__ import annotations

import textwrap

import pandas as pd
from matplotlib.axes import Axes

from cat.mixers.registry import ConstructionConfig
from pipeline.config.grid import shown_variants
from pipeline.config.study import Ablation, Study
from pipeline.reporting.labels import task_label, variant_label, with_slug
from pipeline.reporting.tables import LABELS
from pipeline.storage.results import PRIMARY

AXIS_LABELS = {
    "conv_q": "kernel size of Q",
    "conv_k": "kernel size of K",
    "conv_v": "kernel size of V",
    "position": "positional encoding",
}


def trained_variants(study: Study, ablation: Ablation) -> list[str]:
    """The variants of the figure without constructions, which have no value on a settings axis."""
    return [v for v in shown_variants(ablation) if not isinstance(study.variants[v], ConstructionConfig)]


def axis_label(key: str) -> str:
    """The axis label of a variant's key."""
    return AXIS_LABELS.get(key, key.replace("_", " "))


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
    axes.set(title=task_title(study, task), xlabel=x, ylabel=LABELS[metric])
    if metric == "accuracy":
        axes.set_ylim(-0.04, 1.04)
    if legend := axes.get_legend():
        legend.remove()
