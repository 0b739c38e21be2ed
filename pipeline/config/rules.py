"""Rules across sections of params.yaml."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator

from cat.mixers.attention.config import AttentionConfig
from cat.mixers.registry import ConstructionConfig
from cat.tasks.registry import Recall, Text
from pipeline.config.errors import nearest
from pipeline.config.grid import shown_tasks, shown_variants
from pipeline.config.outputs import clashes
from pipeline.config.study import Ablation, Study


def contradictions(study: Study) -> Iterator[str]:
    """Yield one line per contradiction between sections."""
    yield from clashes(study)
    trained_by: dict[tuple[str, str], str] = {}
    for name, ablation in study.ablations.items():
        yield from _check_names(study, name, ablation)
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
        if ablation.plot == "recall" and variants:
            for task in tasks:
                if (task, variants[0]) not in trained_by:
                    yield f"ablations.{name}: plot = recall compares with {variants[0]!r}, which is not trained on {task!r}"
    for task, variant in trained_by:
        if task in study.tasks and variant in study.variants:
            data, model = study.tasks[task].data, study.variants[variant]
            try:
                model.check_length(data.length)
                if isinstance(model, ConstructionConfig):
                    data.check_construction()
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
        if section.training.batch > (fewest := min(section.data.training_counts.values())):
            problem = f"exceeds train_examples = {section.data.train_examples}"
            if fewest < section.data.train_examples:
                problem += f", which give {fewest} per training length"
            yield f"tasks.{name}.training.batch = {section.training.batch}: {problem}"


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
    if ablation.x is not None:
        yield from _check_axis(study, f"ablations.{name}.x = {json.dumps(ablation.x)}", ablation, ablation.x)
    yield from _check_plot(study, f"ablations.{name}: plot = {ablation.plot}", ablation)


def _check_plot(study: Study, subject: str, ablation: Ablation) -> Iterator[str]:
    """Yield what a plot needs and a variant or task does not have."""
    models = {variant: study.variants[variant] for variant in shown_variants(ablation) if variant in study.variants}
    tasks = shown_tasks(study, ablation)
    if ablation.plot in ("attention", "example"):
        for variant, model in models.items():
            if not model.has_attention:
                yield f"{subject} needs attention weights, but variant {variant!r} has none"
    if ablation.plot == "example":
        for task in tasks:
            if not isinstance(study.tasks[task].data, Recall):
                yield f"{subject} needs a recall task, but task {task!r} is none"
    if ablation.plot == "filters":
        for variant, model in models.items():
            if not (model.has_convolution or isinstance(model, ConstructionConfig)):
                yield f"{subject} needs a convolution, but variant {variant!r} has none"
    if ablation.plot == "stability":
        for task in tasks:
            if len(study.tasks[task].training.learning_rates) < 2:
                yield f"{subject} needs at least two learning rates, but task {task!r} has one"
    if ablation.plot in ("positions", "recall"):
        for task in tasks:
            data = study.tasks[task].data
            if not isinstance(data, Text):
                yield f"{subject} needs a text task, but task {task!r} is none"
            elif ablation.plot == "recall" and data.ngram is None:
                yield f"{subject} needs tasks.{task}.data.ngram, which defines the answers that can be recalled"
    if ablation.plot == "recall" and len(shown_variants(ablation)) == 1:
        yield f"{subject} compares variants with the first, so it needs at least two"
    if ablation.plot == "learning_rates":
        for variant, model in models.items():
            if not (isinstance(model, AttentionConfig) and model.only_keys_convolved):
                yield (
                    f"{subject} needs one layer of attention without positions and qk_norm, convolved only by conv_k with one"
                    f" kernel per head; variant {variant!r} differs"
                )
        for task in tasks:
            data = study.tasks[task].data
            if not (isinstance(data, Recall) and data.ngram == 1):
                yield f"{subject} needs a recall task with ngram = 1, but task {task!r} is none"


def _check_axis(study: Study, subject: str, ablation: Ablation, x: str) -> Iterator[str]:
    """Check that each variant has its own place on the axis; two variants in one place would be averaged."""
    places: dict[object, str] = {}
    for variant in shown_variants(ablation):
        model = study.variants.get(variant)
        if model is None or isinstance(model, ConstructionConfig):  # a construction is drawn as a horizontal line
            continue
        if x not in type(model).model_fields:
            yield f"{subject}: variant {variant!r} has no such key" + nearest(x, type(model).model_fields)
            continue
        value = getattr(model, x)
        if ablation.plot == "sweep" and value is None:
            key = "reference_variants" if variant in ablation.reference_variants else "variants"
            yield (f"{subject}: variant {variant!r} does not set it. Fix: set variants.{variant}.{x}, or remove it from {key}")
            continue
        if ablation.plot == "sweep" and (isinstance(value, bool) or not (isinstance(value, int | float) or value == "full")):
            yield f"{subject}: a sweep needs numbers, but variant {variant!r} has {json.dumps(value)}"
        place = (value, ablation.plot == "contrast" and model.has_convolution)
        if place in places:
            yield f"{subject}: has the same value for variants {places[place]!r} and {variant!r}"
        places[place] = variant
