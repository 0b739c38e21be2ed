"""The cells of a study. Every stage iterates over this grid."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any, NamedTuple

from cat.config import ModelConfig
from pipeline.config.errors import config_error, find_entry
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


def check_cell(study: Study, task: str, variant: str) -> None:
    """Raise ParamsError if no ablation trains the variant on the task."""
    find_entry(study.tasks, "tasks", task)
    find_entry(study.variants, "variants", variant)
    if (task, variant) not in study.training:
        raise config_error("params.yaml", [f"ablations: none trains {variant!r} on {task!r}; name both in one"])


def seeds_of(study: Study, task: str, variant: str) -> tuple[int, ...]:
    """The seeds of a cell."""
    return study.training[task, variant].seeds


def judged_seeds(study: Study, task: str, variant: str) -> tuple[int, ...]:
    """The seeds of a cell that decide claims: those from `verdict_seeds_from` on."""
    return tuple(seed for seed in seeds_of(study, task, variant) if seed >= study.verdict_seeds_from)


def seeds_text(study: Study, shown: Iterable[Cell] | None = None) -> str:
    """The seeds of cells, by default of all: `0, 1, 2`, or `3 to 10 per cell` if cells have different seeds."""
    lists = {seeds_of(study, cell.task, cell.variant) for cell in (cells(study) if shown is None else shown)}
    if len(lists) == 1:
        return ", ".join(map(str, *lists))
    counts = sorted({len(seeds) for seeds in lists})
    return f"{counts[0]} to {counts[-1]} per cell" if len(counts) > 1 else f"{counts[0]} per cell"


def variant_value(study: Study, variant: str, key: str) -> Any:
    """The value of a key of a variant's model, or of the first of its mixers that has it. Raises KeyError without such a key."""
    model = study.variants[variant]
    if not isinstance(model, ModelConfig):
        raise KeyError(key)
    of_mixers = [getattr(mixer, key) for mixer in model.mixers if key in type(mixer).model_fields]
    if key == "position":
        return next((value for value in (model.position, *of_mixers) if value != "none"), "none")
    if key == "mixer":
        return " + ".join(mixer.mixer for mixer in model.mixers)
    if key in type(model).model_fields:
        return getattr(model, key)
    if not of_mixers:
        raise KeyError(key)
    return of_mixers[0]


def variant_keys(study: Study, variant: str) -> list[str]:
    """The keys that `variant_value` knows for a variant."""
    model = study.variants[variant]
    if not isinstance(model, ModelConfig):
        return []
    keys = [*type(model).model_fields, *itertools.chain.from_iterable(type(mixer).model_fields for mixer in model.mixers)]
    return [key for key in dict.fromkeys(keys) if key != "mixers"]


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
