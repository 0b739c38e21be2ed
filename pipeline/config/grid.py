"""The cells of a study: the one function that everything else walks."""

from __future__ import annotations

import itertools
from typing import NamedTuple

from pipeline.config.study import Study


class Cell(NamedTuple):
    """One task and one variant; the seeds of a cell run inside it."""

    task: str
    variant: str
    ablation: str
    """The ablation that trains the cell."""


def cells(study: Study) -> list[Cell]:
    """Every cell, in the order of params.yaml."""
    return [
        Cell(task, variant, name)
        for name, ablation in study.ablations.items()
        for task, variant in itertools.product(ablation.tasks, ablation.variants)
    ]


def variants_on(study: Study, task: str) -> list[str]:
    """The variants that are trained on `task`, in the order of `variants`."""
    trained = {cell.variant for cell in cells(study) if cell.task == task}
    return [variant for variant in study.variants if variant in trained]
