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
from pipeline.config.study import Ablation, Study


def contradictions(study: Study) -> Iterator[str]:
    """What no section can see alone."""
    owner: dict[tuple[str, str], str] = {}
    for name, ablation in study.ablations.items():
        yield from _unknown_names(study, name, ablation)
        for cell in itertools.product(ablation.tasks, ablation.variants):
            first = owner.setdefault(cell, name)
            if first != name:
                yield (
                    f"ablations.{name}.variants: {cell[1]!r} on {cell[0]!r} is trained by ablation {first!r} already;"
                    " list it under beside"
                )
    for name, ablation in study.ablations.items():
        tasks, variants = shown_tasks(study, ablation), shown_variants(ablation)
        for variant in ablation.reference_variants:
            if variant in study.variants and tasks and not any((task, variant) in owner for task in tasks):
                yield f"ablations.{name}.beside: {variant!r} is trained on none of its tasks; list it under variants"
        for task in ablation.reference_tasks:
            if task in study.tasks and variants and not any((task, variant) in owner for variant in variants):
                yield f"ablations.{name}.across: none of its variants is trained on {task!r}; list it under tasks"
        if ablation.plot == "recall" and variants:
            for task in tasks:
                if (task, variants[0]) not in owner:
                    yield f"ablations.{name}: figure = recall is of gains on {variants[0]!r}, which is not trained on {task!r}"
    for task, variant in owner:
        if task in study.tasks and variant in study.variants:
            data, model = study.tasks[task].data, study.variants[variant]
            try:
                model.check_length(data.length)
            except ValueError as error:
                yield f"variants.{variant}: {error} of task {task!r}"
            if isinstance(model, ConstructionConfig):
                try:
                    data.check_theorem()
                except ValueError as error:
                    yield f"variants.{variant} on task {task!r}: {error}"
    for key, names in (("tasks", {task for task, _ in owner}), ("variants", {variant for _, variant in owner})):
        for name in getattr(study, key):
            if name not in names:
                yield f"{key}.{name}: belongs to no ablation, so it would not be trained; name it in one or take it out"
    for name in study.resources.tasks:
        if name not in study.tasks:
            yield f"resources.tasks.{name}: is not among tasks" + nearest(name, study.tasks)
    for name, section in study.tasks.items():
        for multiple in sorted(set(study.evaluate.multiples) - set(section.data.multiples)):
            yield f"evaluate.multiples: {multiple:g} is not among tasks.{name}.data.multiples"
        if section.training.batch > section.data.train_examples:
            yield f"tasks.{name}.train.batch = {section.training.batch}: is more than the {section.data.train_examples} training examples"


def _unknown_names(study: Study, name: str, ablation: Ablation) -> Iterator[str]:
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
        yield from _unclear_axis(study, f"ablations.{name}.x = {json.dumps(ablation.x)}", ablation, ablation.x)
    yield from _nothing_to_draw(study, f"ablations.{name}: figure = {ablation.plot}", ablation)


def _nothing_to_draw(study: Study, subject: str, ablation: Ablation) -> Iterator[str]:
    """What a figure of attention, of filters or of text has no place for."""
    models = {variant: study.variants[variant] for variant in shown_variants(ablation) if variant in study.variants}
    if ablation.plot in ("attention", "example"):
        for variant, model in models.items():
            if not model.has_attention:
                yield f"{subject} shows weights of attention, and variant {variant!r} has none"
    if ablation.plot == "example":
        for task in shown_tasks(study, ablation):
            if not isinstance(study.tasks[task].data, Recall):
                yield f"{subject} shows one sequence of recall, which task {task!r} is not"
    if ablation.plot == "filters":
        for variant, model in models.items():
            if not (model.has_convolution or isinstance(model, ConstructionConfig)):
                yield f"{subject} shows filters, and variant {variant!r} has none"
    if ablation.plot == "stability":
        for task in shown_tasks(study, ablation):
            if len(study.tasks[task].training.learning_rates) < 2:
                yield f"{subject} is drawn against the learning rate, of which task {task!r} has one"
    if ablation.plot in ("positions", "recall"):
        for task in shown_tasks(study, ablation):
            data = study.tasks[task].data
            if not isinstance(data, Text):
                yield f"{subject} is about text, which task {task!r} is not"
            elif ablation.plot == "recall" and data.ngram is None:
                yield f"{subject} is about recalled answers, and tasks.{task}.data.ngram, which says what they are, is missing"
    if ablation.plot == "recall" and len(shown_variants(ablation)) == 1:
        yield f"{subject} compares variants with the first, and there is no other"
    if ablation.plot == "learning_rates":
        for variant, model in models.items():
            if not (isinstance(model, AttentionConfig) and model.only_keys_convolved):
                yield (
                    f"{subject} is about one layer of attention without positions and qk_norm, its only filter on k,"
                    f" one a head, which variant {variant!r} is not"
                )
        for task in shown_tasks(study, ablation):
            data = study.tasks[task].data
            if not (isinstance(data, Recall) and data.ngram == 1):
                yield f"{subject} is about recall with ngram = 1, which task {task!r} is not"


def _unclear_axis(study: Study, subject: str, ablation: Ablation, x: str) -> Iterator[str]:
    """Two variants in one place of a figure would be drawn as their mean."""
    places: dict[object, str] = {}
    for variant in shown_variants(ablation):
        model = study.variants.get(variant)
        if model is None or isinstance(model, ConstructionConfig):  # a theorem is drawn as a line across
            continue
        if x not in type(model).model_fields:
            yield f"{subject}: variant {variant!r} has no such key" + nearest(x, type(model).model_fields)
            continue
        value = getattr(model, x)
        if ablation.plot == "sweep" and value is None:
            key = "reference_variants" if variant in ablation.reference_variants else "variants"
            yield f"{subject}: variant {variant!r} has no {x}; set variants.{variant}.{x}, or take {variant!r} out of {key}"
            continue
        if ablation.plot == "sweep" and (isinstance(value, bool) or not (isinstance(value, int | float) or value == "full")):
            yield f"{subject}: a sweep needs a number, and variant {variant!r} has {json.dumps(value)}"
        place = (value, ablation.plot == "contrast" and model.has_convolution)
        if place in places:
            yield f"{subject}: does not tell variant {variant!r} from {places[place]!r}"
        places[place] = variant
