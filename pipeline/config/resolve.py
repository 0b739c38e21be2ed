"""Complete a study: the models of its variants and the training settings of its cells.

A value comes from the first of these that has the key:

    model       variants.<variant>, defaults
    training    variants.<variant>.training.tasks.<task>, variants.<variant>.training, tasks.<task>.training, defaults.training

An error of an inherited value names the place where it is written, and a variant that uses it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from pydantic import ValidationError

from cat.config import Config, MixerConfig, ModelConfig, mixer_name
from cat.mixers.registry import (
    CONSTRUCTION,
    MODEL_KEYS,
    POSITIONS,
    AnyVariant,
    ConstructionConfig,
    Section,
    Source,
    UnknownMixerError,
    compose,
    mixer_class,
    mixer_entries,
    mixer_names,
    no_position,
)
from pipeline.config.errors import config_error, key_of, nearest, problems_of, subject_of
from pipeline.config.names import LINE, PATTERNS
from pipeline.config.study import CellTraining, Settings, Study, StudyFile, TaskConfig

TRAINING, LABEL = "training", "label"
"""Keys of a variant that its model does not have."""


class Problem(NamedTuple):
    """One error: the path of a key with its value, or of a section, and the problem."""

    path: str
    problem: str
    used_by: str | None = None
    """The variant that inherits the value."""


def complete(written: StudyFile, file: object, switched_off: tuple[str, ...] = ()) -> Study:
    """Return the complete study. Raises ParamsError listing every error."""
    problems: list[Problem] = []
    variants, training = _models(written.defaults, written.variants, problems), {}
    labels = _labels(written.variants, problems)
    for task, variant in _cells(written):
        if (settings := _training(written, task, variant, problems)) is not None:
            training[task, variant] = settings
    if problems:
        raise config_error(str(file), _lines(problems))
    same = {key: getattr(written, key) for key in StudyFile.model_fields if key in Study.model_fields}
    tasks = {name: TaskConfig(data=section.data) for name, section in written.tasks.items()}
    task_labels = {name: section.label for name, section in written.tasks.items() if section.label is not None}
    complete = {"tasks": tasks, "variants": variants, "training": training, "switched_off": switched_off}
    return Study(**{**same, **complete, "task_labels": task_labels, "variant_labels": labels})


def variant_errors(raw: object) -> list[str]:
    """The errors of `defaults` and `variants` in a file whose other sections may be wrong."""
    defaults, variants = (raw.get(key) if isinstance(raw, dict) else None for key in ("defaults", "variants"))
    if not (isinstance(defaults, dict) and isinstance(variants, dict) and all(isinstance(v, dict) for v in variants.values())):
        return []
    problems: list[Problem] = []
    _models(defaults, variants, problems)
    return list(_lines(problems))


def _models(defaults: Settings, variants: Mapping[str, Settings], problems: list[Problem]) -> dict[str, AnyVariant]:
    """The model of each variant without errors."""
    models = {name: model for name in variants if (model := _model(name, variants[name], defaults, problems)) is not None}
    problems += _unknown_defaults(defaults, variants)
    return models


def _labels(variants: Mapping[str, Settings], problems: list[Problem]) -> dict[str, str]:
    """The name of each variant that states one."""
    labels = {name: settings[LABEL] for name, settings in variants.items() if LABEL in settings}
    for name, label in labels.items():
        if not (isinstance(label, str) and re.match(LINE, label)):
            problems.append(Problem(subject_of(f"variants.{name}.{LABEL}", label), PATTERNS[LINE]))
    return labels


def _cells(written: StudyFile) -> Iterator[tuple[str, str]]:
    """Each trained cell of known tasks and variants; unknown names are reported by the rules."""
    seen = set()
    for ablation in written.ablations.values():
        for task in ablation.tasks:
            for variant in ablation.variants:
                if task in written.tasks and variant in written.variants and (task, variant) not in seen:
                    seen.add((task, variant))
                    yield task, variant


def _model(name: str, settings: Settings, defaults: Settings, problems: list[Problem]) -> AnyVariant | None:
    """The model of a variant; None after adding to `problems`."""
    own, defaults = _of_model(settings), _of_model(defaults)
    where = f"variants.{name}"
    if own.get("mixer") == CONSTRUCTION:
        keys = {key: value for key, value in own.items() if key != "mixer"}
        for extra in (key for key in keys if key not in ConstructionConfig.model_fields):
            subject = subject_of(f"{where}.{extra}", own[extra])
            problems.append(Problem(subject, "a construction has no keys besides mixer and placement"))
            return None
        section = Section(ConstructionConfig, keys, {})
        constructions: list[ConstructionConfig] = list(_parse(section, where, problems))
        return constructions[0] if constructions else None
    try:
        composed = compose(own, defaults)
    except ValueError as error:
        problems.append(_mixer_problem(error, own, defaults, where))
        return None
    found = [_key_problem(own, defaults, where, path, problem) for path, problem in composed.problems]
    mixers: list[MixerConfig] = []
    for section in composed.mixers:
        mixers += _parse(section, where, found)
    if not found:
        sources = composed.model.sources | {"mixer": Source("mixer" not in own, ("mixer",))}
        model = Section(ModelConfig, composed.model.values | {"mixers": tuple(mixers)}, sources)
        inherited = [section.sources for section in composed.mixers]
        models: list[ModelConfig] = list(_parse(model, where, found, inherited))
        if not found:
            return models[0]
    problems += found
    return None


def _training(written: StudyFile, task: str, variant: str, problems: list[Problem]) -> CellTraining | None:
    """The training settings of a cell; None after adding to `problems`."""
    section = Section(CellTraining, {}, {})
    for place, settings in _training_layers(written, task, variant, problems):
        for key, value in settings.items():
            section.set(key, value, Source(place == "defaults.training", (place, key)))
    if any(problem.path.startswith(("defaults.training = ", f"variants.{variant}.training")) for problem in problems):
        return None  # the error about the mapping is enough
    for key, field in CellTraining.model_fields.items():
        if field.is_required() and key not in section.values:
            problems.append(Problem(f"defaults.training.{key}", "is missing", f"variants.{variant} on {task}"))
            return None
    parsed: list[CellTraining] = list(_parse(section, f"variants.{variant} on {task}", problems))
    return parsed[0] if parsed else None


def _training_layers(
    written: StudyFile, task: str, variant: str, problems: list[Problem]
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The mappings that training settings of a cell come from, each with its place, the most specific first."""
    own = written.variants[variant].get(TRAINING, {})
    if not isinstance(own, dict) or not isinstance(own.get("tasks", {}), dict):
        problems.append(Problem(subject_of(f"variants.{variant}.training", own), "must be a mapping; under tasks, one per task"))
        return
    for name, settings in own.get("tasks", {}).items():
        if name not in written.tasks:
            problems.append(
                Problem(f"variants.{variant}.training.tasks.{name}", "is not among tasks" + nearest(name, written.tasks))
            )
        elif not isinstance(settings, dict):
            problems.append(Problem(subject_of(f"variants.{variant}.training.tasks.{name}", settings), "must be a mapping"))
        elif name == task:
            yield f"variants.{variant}.training.tasks.{task}", settings
    yield f"variants.{variant}.training", {key: value for key, value in own.items() if key != "tasks"}
    yield f"tasks.{task}.training", written.tasks[task].training
    defaults = written.defaults.get(TRAINING, {})
    if isinstance(defaults, dict):
        yield "defaults.training", defaults
    else:
        problems.append(Problem(subject_of("defaults.training", defaults), "must be a mapping"))


def _parse(section: Section, where: str, problems: list[Problem], others: Iterable[Mapping[str, Source]] = ()) -> Iterator[Any]:
    """Yield the checked section, or add its errors to `problems`. `others` are the sources of values that its rules also use."""
    try:
        yield section.schema.model_validate(section.values)
    except ValidationError as error:
        for steps, value, problem in problems_of(error, section.values, section.schema):
            if not steps:
                problems.append(_rule_problem(problem, where, [section.sources, *others]))
                continue
            key, *inner = steps
            source = section.sources.get(str(key), Source(False, (key,)))
            path = key_of([_path(source, where), *inner])
            problems.append(Problem(subject_of(path, *value) if value else path, problem, where if source.inherited else None))


def _path(source: Source, where: str) -> str:
    steps = [str(step) for step in source.path]
    if "." in steps[0]:  # complete already
        return ".".join(steps)
    return ".".join(["defaults" if source.inherited else where, *steps])


def _rule_problem(problem: str, where: str, sources: list[Mapping[str, Source]]) -> Problem:
    """The problem of values that contradict each other, at the place of the first that is not inherited."""
    named = dict.fromkeys(re.findall(r"(\w+) = ", problem))
    places = {key: next((of[key] for of in sources if key in of), None) for key in named}
    known = {key: source for key, source in places.items() if source is not None}
    inherited = [key for key, source in known.items() if source.inherited]
    first = next((source for source in known.values() if not source.inherited), next(iter(known.values()), None))
    if first is None:
        return Problem(where, problem)
    path = _path(first, where).rpartition(".")[0]
    if first.inherited:
        return Problem(path, problem, where)
    return Problem(path, problem + (f" ({' and '.join(inherited)} from defaults)" if inherited else ""))


def _mixer_problem(error: ValueError, own: Settings, defaults: Settings, where: str) -> Problem:
    inherited = "mixer" not in own
    value = own.get("mixer", defaults.get("mixer"))
    path = f"{'defaults' if inherited else where}.mixer"
    text = str(error)
    if isinstance(error, UnknownMixerError):
        value = next(entry["mixer"] for entry in mixer_entries(value) if _is_unknown(entry["mixer"]))
        if "." not in value:
            known = (*error.known, CONSTRUCTION)
            text = f"must be one of {', '.join(map(repr, known))}" + nearest(value, known)
    return Problem(path if text == "is missing" else subject_of(path, value), text, where if inherited else None)


def _is_unknown(name: str) -> bool:
    try:
        mixer_class(name)
    except UnknownMixerError:
        return True
    return False


def _key_problem(own: Settings, defaults: Settings, where: str, path: tuple[str | int, ...], problem: str) -> Problem:
    """The problem of a key that no part of the variant's model has."""
    inherited = path[0] not in own
    value: Any = defaults if inherited else own
    for step in path:
        value = value[step] if isinstance(step, str) or isinstance(value, list) else value  # a single mixer needs no list
    key = str(path[-1])
    if problem == "unknown key":
        classes = _mixer_classes(own.get("mixer", defaults.get("mixer")))
        renamed = next((cls.renamed_keys[key] for cls in classes if key in cls.renamed_keys), None)
        if renamed is not None:
            problem = f"renamed to {renamed}"
        elif key == "blocks":
            problem = "renamed to mixer, which can be a list"
        elif any(key in mixer_class(name).model_fields for name in mixer_names()):
            problem = f"mixer {' and '.join(repr(mixer_name(cls)) for cls in classes)} has no {key}"
        else:
            known = [*MODEL_KEYS, TRAINING, LABEL, *(key for cls in classes for key in cls.model_fields)]
            problem += nearest(key, known) or f"; known are {', '.join(dict.fromkeys(known))}"
    elif key == "position" and value not in POSITIONS:
        problem += nearest(value, POSITIONS)
    place = "defaults" if inherited else where
    return Problem(subject_of(key_of([place, *path]), value), problem, where if inherited else None)


def _mixer_classes(mixer: object) -> list[type[MixerConfig]]:
    return [mixer_class(entry["mixer"]) for entry in mixer_entries(mixer)]


def _unknown_defaults(defaults: Settings, variants: Mapping[str, Settings]) -> Iterator[Problem]:
    """Defaults that neither a mixer of this library nor one of the study has."""
    known = {*MODEL_KEYS, "mixer", TRAINING}
    classes = [mixer_class(name) for name in mixer_names()]
    for settings in (defaults, *variants.values()):
        try:
            classes += _mixer_classes(settings["mixer"])
        except (KeyError, TypeError, ValueError):
            continue
    known |= {key for cls in classes for key in cls.model_fields}
    for key, value in defaults.items():
        if key == "position" and value not in POSITIONS:
            yield Problem(subject_of("defaults.position", value), no_position(value) + nearest(value, POSITIONS))
        elif key not in known:
            yield Problem(subject_of(f"defaults.{key}", value), "no variant has this key" + nearest(key, sorted(known)))


def _of_model(settings: Settings) -> Settings:
    return {key: value for key, value in settings.items() if key not in (TRAINING, LABEL)}


def _lines(problems: Iterable[Problem]) -> Iterator[str]:
    """One line per problem; a default that several variants use is reported once."""
    users: dict[tuple[str, str], list[str]] = {}
    for problem in problems:
        used_by = users.setdefault((problem.path, problem.problem), [])
        if problem.used_by is not None and problem.used_by not in used_by:
            used_by.append(problem.used_by)
    for (path, text), used_by in users.items():
        others = f" and {len(used_by) - 1} more" if len(used_by) > 1 else ""
        yield f"{path}{f' (used by {used_by[0]}{others})' if used_by else ''}: {text}"


def resolved(config: Config) -> dict[str, Any]:
    """All values of a configuration, without features that are off: None and False as defaults.

    So a new optional key changes no cell. Equal configurations give equal mappings, wherever their values are written.
    """
    values = config.model_dump(mode="json")
    for name, field in type(config).model_fields.items():
        key, value = field.alias or name, getattr(config, name)
        if value == field.default and (value is None or value is False):
            del values[key]
        elif isinstance(value, tuple) and value and isinstance(value[0], Config):
            values[key] = [resolved(item) for item in value]
    return values


def unwritten(config: Config) -> dict[str, Any]:
    """The resolved values of keys that the file leaves to their defaults."""
    written = {type(config).model_fields[name].alias or name for name in config.model_fields_set}
    return {key: value for key, value in resolved(config).items() if key not in written}
