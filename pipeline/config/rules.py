"""Rules across sections of params.yaml."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator

from cat.mixers.registry import ConstructionConfig
from pipeline.config.errors import nearest, shorten
from pipeline.config.grid import shown_tasks, shown_variants
from pipeline.config.outputs import clashes
from pipeline.config.plots import load_plot
from pipeline.config.study import Ablation, Study


def contradictions(study: Study) -> Iterator[str]:
    """Yield one line per contradiction between sections."""
    if unknown := list(_unknown_plots(study)):
        yield from unknown
        return
    yield from clashes(study)
    trained_by: dict[tuple[str, str], str] = {}
    for name, ablation in study.ablations.items():
        wrong_names = list(_check_names(study, name, ablation))
        yield from wrong_names or (f"ablations.{name}: {line}" for line in load_plot(ablation.plot).problems(study, ablation))
        for cell in itertools.product(ablation.tasks, ablation.variants):
            first = trained_by.setdefault(cell, name)
            if first != name:
                yield (
                    f"ablations.{name}.variants: {cell[1]!r} on {cell[0]!r} is already trained by ablation {first!r}."
                    " Fix: move it to reference_variants"
                )
    for name, ablation in study.ablations.items():
        tasks, variants = shown_tasks(study, ablation), shown_variants(ablation)
        for variant in ablation.reference_variants:
            if variant in study.variants and tasks and not any((task, variant) in trained_by for task in tasks):
                yield (
                    f"ablations.{name}.reference_variants: {variant!r} is trained on none of the tasks of this ablation."
                    " Fix: move it to variants"
                )
        for task in ablation.reference_tasks:
            if task in study.tasks and variants and not any((task, variant) in trained_by for variant in variants):
                yield (
                    f"ablations.{name}.reference_tasks: no variant of this ablation is trained on {task!r}. Fix: move it to tasks"
                )
    for task, variant in trained_by:
        if task in study.tasks and variant in study.variants:
            data, model = study.tasks[task].data, study.variants[variant]
            try:
                model.check_length(data.length)
                if isinstance(model, ConstructionConfig):
                    data.check_construction(model.placement)
            except ValueError as error:
                yield f"variants.{variant}: {error} (task {task!r})"
    for key, names in (("tasks", {task for task, _ in trained_by}), ("variants", {variant for _, variant in trained_by})):
        for name in getattr(study, key):
            if name not in names:
                yield f"{key}.{name}: is in no ablation, so it would not be trained. Fix: add it to an ablation or remove it"
    for name in study.resources.tasks:
        if name not in study.tasks:
            yield f"resources.tasks.{name}: is not among tasks" + nearest(name, study.tasks)
    for name, section in study.tasks.items():
        for multiple in sorted(set(study.evaluate.multiples) - set(section.data.multiples)):
            yield f"evaluate.multiples: {multiple:g} is not among tasks.{name}.data.multiples"
        fewest = min(section.data.training_counts.values())
        for batch in sorted({training.batch for (task, _), training in study.training.items() if task == name}):
            if batch > fewest:
                each = f", which give {fewest} per training length" if fewest < section.data.train_examples else ""
                yield (
                    f"tasks.{name}.data.train_examples = {section.data.train_examples}: is fewer than the batch of {batch}{each}"
                )


def _unknown_plots(study: Study) -> Iterator[str]:
    for name, ablation in study.ablations.items():
        try:
            load_plot(ablation.plot)
        except ValueError as error:
            yield f"ablations.{name}.plot = {json.dumps(shorten(ablation.plot, 60))}: {error}"


def _check_names(study: Study, name: str, ablation: Ablation) -> Iterator[str]:
    for key, section in (
        ("tasks", "tasks"),
        ("reference_tasks", "tasks"),
        ("variants", "variants"),
        ("reference_variants", "variants"),
    ):
        known = getattr(study, section)
        for entry in getattr(ablation, key):
            if entry not in known:
                yield f"ablations.{name}.{key} = {json.dumps(entry)}: is not among {section}" + nearest(entry, known)
