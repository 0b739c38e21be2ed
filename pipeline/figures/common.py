"""What several figures share."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes

from cat.mixers.registry import ConstructionConfig
from pipeline.config.grid import shown_variants
from pipeline.config.study import Ablation, Study
from pipeline.reporting.tables import LABELS
from pipeline.storage.results import PRIMARY


def trained_variants(study: Study, ablation: Ablation) -> list[str]:
    """The variants of the figure without those of a theorem, which have no place on an axis."""
    return [v for v in shown_variants(ablation) if not isinstance(study.variants[v], ConstructionConfig)]


def _limit(study: Study, table: pd.DataFrame, axes: Axes) -> None:
    """What a theorem's weights reach, as a line across."""
    values = table[table["variant"].map(lambda variant: isinstance(study.variants[variant], ConstructionConfig))]["value"]
    if len(values):
        axes.axhline(values.mean(), color="black", lw=1.4, ls=":", label="theory")


def _label(study: Study, task: str, axes: Axes, x: str) -> None:
    metric = PRIMARY[study.tasks[task].data.goal]
    axes.set(title=task, xlabel=x, ylabel=LABELS[metric])
    if metric == "accuracy":
        axes.set_ylim(-0.04, 1.04)
    if legend := axes.get_legend():
        legend.remove()
