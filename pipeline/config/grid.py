"""The cells of a study. Every stage iterates over this grid."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

from pipeline.config.study import Ablation, Study


class Cell(NamedTuple):
    """One task and one variant; a cell trains all seeds."""

    task: str
    variant: str
    ablation: str
    """The ablation that trains the cell."""


def cells(study: Study) -> list[Cell]:
    """All trained cells, in the order of params.yaml."""
    return [
        Cell(task, variant, name)
        for name, ablation in study.ablations.items()
        for task, variant in itertools.product(ablation.tasks, ablation.variants)
    ]


def variants_on(study: Study, task: str) -> list[str]:
    """The variants trained on `task`, in the order of `variants`."""
    trained = {cell.variant for cell in cells(study) if cell.task == task}
    return [variant for variant in study.variants if variant in trained]


def shown_tasks(study: Study, ablation: Ablation) -> list[str]:
    """The tasks in the figure of an ablation, in the order of `tasks`."""
    return [task for task in study.tasks if task in (*ablation.tasks, *ablation.reference_tasks)]


def shown_variants(ablation: Ablation) -> list[str]:
    """The variants in the figure of an ablation, reference variants first."""
    return [*ablation.reference_variants, *ablation.variants]


def shown_on(study: Study, ablation: Ablation, task: str) -> list[str]:
    """The variants in the figure of an ablation that are trained on `task`, in the order of the figure."""
    trained = variants_on(study, task)
    return [variant for variant in shown_variants(ablation) if variant in trained]


def shown_cells(study: Study, ablation: Ablation) -> list[tuple[str, str]]:
    """(task, variant) of each trained cell in the figure of an ablation, task by task."""
    return [(task, variant) for task in shown_tasks(study, ablation) for variant in shown_on(study, ablation, task)]


def seeds_of(study: Study, task: str, variant: str) -> tuple[int, ...]:
    """The seeds with which the cell of `variant` on `task` is trained."""
    return study.seeds


def variant_value(study: Study, variant: str, key: str) -> Any:
    """The value of a key of a variant. Raises KeyError if the variant has no such key."""
    if key not in variant_keys(study, variant):
        raise KeyError(key)
    return getattr(study.variants[variant], key)


def variant_keys(study: Study, variant: str) -> tuple[str, ...]:
    """The keys of a variant, set or not."""
    return tuple(type(study.variants[variant]).model_fields)
