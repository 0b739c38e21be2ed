"""params.yaml: its schema, its rules across sections, and its errors, one line each.

Read with the YAML 1.2 parser that DVC reads it with. Importing this imports no torch.
"""

from __future__ import annotations

import difflib
import io
import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Self, TypeVar, Union, get_args, get_origin

from pydantic import Field, TypeAdapter, ValidationError, model_validator
from ruamel.yaml import YAML, YAMLError
from ruamel.yaml.error import MarkedYAMLError

from cat.config import Attention, Configuration, Count, Landmark, Protocol, Schedule, Theory, Variant, VariantConfiguration
from cat.tasks.registry import Recall, TaskConfiguration, Text

NAME = r"^[a-z0-9][a-z0-9_]{0,39}$"
"""Names become stage names, folders and command lines; a legend leaves out what begins with an underscore."""
LINE = r"^[^\x00-\x1f\x7f-\x9f\u2028\u2029]+$"
CELL = r"^[^\x00-\x1f\x7f-\x9f\u2028\u2029|]+$"
"""A line that a table of Markdown can hold."""
DEVICE = r"^(auto|cpu|cuda(:([0-9]|[1-9][0-9]))?)$"
PATTERNS = {
    NAME: "is not a name of one to forty small letters, digits and underscores, the first of them no underscore",
    LINE: "is not one line of text",
    CELL: "is not one line of text without |",
    DEVICE: "is not auto, cpu, cuda or cuda:N, N from 0 to 99",
}
"""What a text breaks that does not match."""
Name = Annotated[str, Field(pattern=NAME)]
LONGEST = 300
"""Characters of an error, the name of its file aside."""


class TaskSection(Configuration):
    """One task: what its examples are, and how long it is trained."""

    data: TaskConfiguration
    train: Schedule


class Ablation(Configuration):
    """One question: every variant of it is trained on every task of it, then drawn in one figure."""

    question: Annotated[str, Field(pattern=LINE)]
    tasks: Annotated[tuple[Name, ...], Field(strict=False)]
    variants: Annotated[tuple[Name, ...], Field(strict=False)]
    beside: Annotated[tuple[Name, ...], Field(strict=False)] = ()
    """Variants that another ablation trains and that belong in this figure as well."""
    across: Annotated[tuple[Name, ...], Field(strict=False)] = ()
    """Tasks on which other ablations train these variants and that belong in this figure as well."""
    figure: Literal[
        "heatmap", "sweep", "contrast", "lines", "attention", "rates", "stability", "example", "filters", "positions", "recall"
    ]
    """heatmap: variants by tasks; sweep: against a number `x`; contrast: by `x`, filtered beside unfiltered; lines: by length;
    attention: how many tokens share it and how much is on the answer; rates: by learning rate, how many seeds found a key filter
    that solves every length; stability: by learning rate, what every run ended at and what its loss, gradients and attention went
    through; example: what attention reads in one sequence of recall; filters: taps beside the theorem's; positions: bits along
    the windows of a text; recall: what is gained on the first variant, on answers that can be recalled and on others."""
    x: Name | None = None
    """The key of a variant that a sweep or a contrast has on its axis."""

    @property
    def looks_inside(self) -> bool:
        """Whether its figure is of models, or of single answers, rather than of their scores."""
        return self.figure in ("example", "filters", "positions", "recall")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.x is not None) != (self.figure in ("sweep", "contrast")):
            raise ValueError(f"figure = {self.figure} " + ("needs x, the key on its axis" if self.x is None else "has no axis x"))
        for key in ("tasks", "variants", "beside", "across"):
            names = getattr(self, key)
            twice = {name for name in names if names.count(name) > 1}
            if twice:
                raise ValueError(f"{key} has {min(twice)!r} twice")
        for key, other in (("variants", "beside"), ("tasks", "across")):
            if both := set(getattr(self, key)) & set(getattr(self, other)):
                raise ValueError(f"{min(both)!r} is under {key} and under {other}")
        return self


class Evaluation(Configuration):
    """How the test splits are scored."""

    multiples: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1, strict=False)]
    """The multiples of the training length that the tables and `dvc metrics` show."""

    @model_validator(mode="after")
    def _multiples_differ(self) -> Self:
        if len(set(self.multiples)) < len(self.multiples):
            raise ValueError(f"multiples = {list(self.multiples)} has a value twice")
        return self


class Rendering(Configuration):
    """How figures look."""

    dpi: Annotated[int, Field(ge=50, le=600)]
    spread: Literal["range", "sd"]
    """What the bands around a mean over seeds show: smallest to largest, or one standard deviation."""


class Resources(Configuration):
    """What a run asks of a machine of a Ray cluster; several that are trained at once on a GPU ask it together."""

    cpus: Annotated[float, Field(gt=0)] = 1
    gpus: Annotated[float, Field(ge=0, le=1)] = 0
    """The share of one GPU; 0 trains on the CPU."""
    memory_gb: Annotated[float, Field(gt=0)] = 1

    @property
    def bytes(self) -> int:
        return math.ceil(self.memory_gb * 1e9)

    def __str__(self) -> str:
        return f"{self.cpus:g} CPU, {self.gpus:g} GPU and {self.memory_gb:g} GB of memory"


class ClusterResources(Resources):
    """What a run asks on every task, and where a task asks for something else."""

    tasks: dict[Name, Resources] = Field(default_factory=dict)

    def on(self, task: str) -> Resources:
        """What a run asks on `task`: what is not given for it is as it is for all."""
        common = self.model_dump(exclude={"tasks"})
        own = self.tasks[task].model_dump(exclude_unset=True) if task in self.tasks else {}
        return Resources(**{**common, **own})


class Study(Configuration):
    """All of params.yaml."""

    seeds: Annotated[tuple[Annotated[int, Field(ge=0, lt=2**31)], ...], Field(min_length=1, strict=False)]
    data_seed: Annotated[int, Field(ge=0, lt=2**31)]
    device: Annotated[str, Field(pattern=DEVICE)]
    precision: Literal["float32", "bfloat16"]
    deterministic: bool
    """The same last bits on CPUs of all kinds, at some cost in time (pipeline/runtime/determinism.py)."""
    threads: Count | Literal["auto"]
    resources: ClusterResources = ClusterResources()
    tasks: Annotated[dict[Name, TaskSection], Field(min_length=1)]
    variants: Annotated[dict[Name, VariantConfiguration], Field(min_length=1)]
    ablations: Annotated[dict[Name, Ablation], Field(min_length=1)]
    train: Protocol
    evaluate: Evaluation
    render: Rendering

    @model_validator(mode="after")
    def _seeds_differ(self) -> Self:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds = {list(self.seeds)} has a seed twice")
        return self


class ParamsError(Exception):
    """What is wrong with a parameter file: `lines`, one an error, each naming the key, the value and the rule."""

    def __init__(self, lines: list[str]):
        self.lines = [printable(line) for line in lines]
        super().__init__("\n".join(self.lines))

    def __reduce__(self) -> tuple[type[ParamsError], tuple[list[str]]]:
        return ParamsError, (self.lines,)


def printable(text: str) -> str:
    """`text` in one line, with what no terminal should be sent escaped."""
    return "".join(letter if letter.isprintable() else json.dumps(letter)[1:-1] for letter in text)


def load_study(path: str | Path = "params.yaml") -> Study:
    """The study of `path`. Raises ParamsError with every fault that it has."""
    return study_of(read_yaml(path), path)


def study_of(raw: object, file: str | Path) -> Study:
    """The study that `raw`, what `file` says, describes. Raises ParamsError with every fault that it has."""
    study: Study = checked(Study, raw, file)
    if contradictions := list(_contradictions(study)):
        raise refusal(file, contradictions)
    return study


def read_yaml(path: str | Path) -> Any:
    """What a YAML file says, unchecked. Raises ParamsError where it cannot be read."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        if re.search("[0-9a-fA-F_]{4000}", text):  # Python refuses to write out what it reads of an octal or hexadecimal one
            raise ValueError("a number of 4,000 digits or more")
        return YAML(typ="safe").load(text)
    except OSError as error:
        raise refusal(path, [f"{error.strerror}"]) from None
    except UnicodeDecodeError as error:
        raise refusal(path, [f"byte {error.start} is not UTF-8"]) from None
    except YAMLError as error:
        raise refusal(path, [_misread(error)]) from None
    except (ValueError, KeyError, RecursionError) as error:  # of a scalar that is not what it looks like, as 2026-02-30
        raise refusal(path, [f"a value cannot be read: {error}"]) from None


def _misread(error: YAMLError) -> str:
    """Where the parser stopped and why, without its advice to make it more lenient."""
    if not isinstance(error, MarkedYAMLError) or error.problem_mark is None:
        return " ".join(str(error).split())
    place = f"line {error.problem_mark.line + 1}"
    if key := re.match('found duplicate key "(.*?)" with value', error.problem):
        return f"{place}: key {key[1]!r} twice"
    return f"{place}, column {error.problem_mark.column + 1}: {', '.join(filter(None, (error.context, error.problem)))}"


def checked(schema: Any, raw: object, file: str | Path) -> Any:
    """`raw` as a `schema`: a class of configuration, or a mapping to one. Raises ParamsError with every fault that it has."""
    try:
        return TypeAdapter(schema).validate_python(raw)
    except ValidationError as error:
        found = [(_path(fault["loc"], raw, missing=fault["type"] == "missing"), fault) for fault in error.errors()]
        faults: dict[str, dict[str, None]] = {}
        for path, fault in found:
            # A list of names that are wrong is also called empty, and no number, where it may be one.
            inside = any(other[: len(path)] == path and len(other) > len(path) for other, _ in found)
            if not (inside and fault["type"].endswith(("_type", "too_short"))):
                subject, rule = _in_words(fault, path, raw, schema)
                faults.setdefault(subject, {})[rule] = None
        # A key that may be of two kinds breaks a rule of each.
        raise refusal(file, [f"{subject}{', and '.join(rules)}" for subject, rules in faults.items()]) from None


def check_rewritten(path: str | Path) -> None:
    """Raises ParamsError unless the file can be read again once `dvc exp run -S` has written all of it anew."""
    writer = YAML()
    with io.StringIO() as text:
        writer.dump(writer.load(Path(path).read_text(encoding="utf-8")), text)
        try:
            YAML(typ="safe").load(text.getvalue())
        except YAMLError as error:
            place = getattr(error, "problem_mark", None)
            line = text.getvalue().splitlines()[place.line].strip() if place else ""
            what = "cannot be read once `dvc exp run -S` has written it anew, without quotes; is there a question mark in braces?"
            raise refusal(path, [f"{_cut(line, 60)}: {what}"]) from None


def refusal(file: str | Path, faults: Iterable[str]) -> ParamsError:
    """The error that says what is wrong with `file`, each fault cut to LONGEST characters."""
    return ParamsError([f"{file}: {_cut(fault, LONGEST)}" for fault in faults])


def shown_tasks(study: Study, ablation: Ablation) -> list[str]:
    """The tasks of the ablation's figure, in the order of `tasks`."""
    return [task for task in study.tasks if task in (*ablation.tasks, *ablation.across)]


def shown_variants(ablation: Ablation) -> list[str]:
    """The variants of the ablation's figure: what stands beside comes first."""
    return [*ablation.beside, *ablation.variants]


def _contradictions(study: Study) -> Iterator[str]:
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
        for variant in ablation.beside:
            if variant in study.variants and tasks and not any((task, variant) in owner for task in tasks):
                yield f"ablations.{name}.beside: {variant!r} is trained on none of its tasks; list it under variants"
        for task in ablation.across:
            if task in study.tasks and variants and not any((task, variant) in owner for variant in variants):
                yield f"ablations.{name}.across: none of its variants is trained on {task!r}; list it under tasks"
        if ablation.figure == "recall" and variants:
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
            if isinstance(model, Theory):
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
        if section.train.batch > section.data.train:
            yield f"tasks.{name}.train.batch = {section.train.batch}: is more than the {section.data.train} training examples"


def _unknown_names(study: Study, name: str, ablation: Ablation) -> Iterator[str]:
    for key, section in (("tasks", "tasks"), ("across", "tasks"), ("variants", "variants"), ("beside", "variants")):
        known = getattr(study, section)
        for entry in getattr(ablation, key):
            if entry not in known:
                yield f"ablations.{name}.{key} = {json.dumps(entry)}: is not among {section}" + nearest(entry, known)
    if ablation.x is not None:
        yield from _unclear_axis(study, f"ablations.{name}.x = {json.dumps(ablation.x)}", ablation, ablation.x)
    yield from _nothing_to_draw(study, f"ablations.{name}: figure = {ablation.figure}", ablation)


def _nothing_to_draw(study: Study, subject: str, ablation: Ablation) -> Iterator[str]:
    """What a figure of attention, of filters or of text has no place for."""
    models = {variant: study.variants[variant] for variant in shown_variants(ablation) if variant in study.variants}
    if ablation.figure in ("attention", "example"):
        for variant, model in models.items():
            if not model.attends:
                yield f"{subject} shows weights of attention, and variant {variant!r} has none"
    if ablation.figure == "example":
        for task in shown_tasks(study, ablation):
            if not isinstance(study.tasks[task].data, Recall):
                yield f"{subject} shows one sequence of recall, which task {task!r} is not"
    if ablation.figure == "filters":
        for variant, model in models.items():
            if not (model.filtered or isinstance(model, Theory)):
                yield f"{subject} shows filters, and variant {variant!r} has none"
    if ablation.figure == "stability":
        for task in shown_tasks(study, ablation):
            if len(study.tasks[task].train.learning_rates) < 2:
                yield f"{subject} is drawn against the learning rate, of which task {task!r} has one"
    if ablation.figure in ("positions", "recall"):
        for task in shown_tasks(study, ablation):
            data = study.tasks[task].data
            if not isinstance(data, Text):
                yield f"{subject} is about text, which task {task!r} is not"
            elif ablation.figure == "recall" and data.ngram is None:
                yield f"{subject} is about recalled answers, and tasks.{task}.data.ngram, which says what they are, is missing"
    if ablation.figure == "recall" and len(shown_variants(ablation)) == 1:
        yield f"{subject} compares variants with the first, and there is no other"
    if ablation.figure == "rates":
        for variant, model in models.items():
            if not (isinstance(model, Attention) and model.keys_decide):
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
        if model is None or isinstance(model, Theory):  # a theorem is drawn as a line across
            continue
        if x not in type(model).model_fields:
            yield f"{subject}: variant {variant!r} has no such key" + nearest(x, type(model).model_fields)
            continue
        value = getattr(model, x)
        if ablation.figure == "sweep" and value is None:
            key = "beside" if variant in ablation.beside else "variants"
            yield f"{subject}: variant {variant!r} has no {x}; set variants.{variant}.{x}, or take {variant!r} out of {key}"
            continue
        if ablation.figure == "sweep" and (isinstance(value, bool) or not (isinstance(value, int | float) or value == "full")):
            yield f"{subject}: a sweep needs a number, and variant {variant!r} has {json.dumps(value)}"
        place = (value, ablation.figure == "contrast" and model.filtered)
        if place in places:
            yield f"{subject}: does not tell variant {variant!r} from {places[place]!r}"
        places[place] = variant


_MIXERS: tuple[type[Variant], ...] = get_args(get_args(VariantConfiguration)[0])

_RULES = {
    "int_type": "is not a whole number",
    "int_from_float": "is not a whole number",
    "float_type": "is not a number",
    "finite_number": "is not a finite number",
    "bool_type": "is not true or false",
    "string_type": "is not text",
    "string_unicode": "is not text",
    "dict_type": "is not a mapping",
    "model_type": "is not a mapping",
    "model_attributes_type": "is not a mapping",
    "tuple_type": "is not a list",
    "too_short": "is empty",
    "string_too_short": "is empty",
    "invalid_key": "the key is not text; put it in quotes",
}


def _in_words(error: Any, path: list[int | str], raw: object, schema: Any) -> tuple[str, str]:
    """One of pydantic's errors as its subject, the key's path with its value, and the rule that it breaks."""
    kind, context = error["type"], error.get("ctx", {})
    key = ".".join(_cut(str(step), 60) for step in path)
    match kind:
        case "missing":
            return f"{key}: ", "is missing"
        case "value_error":
            return f"{key}: " if key else "", str(context["error"])
        case "union_tag_not_found":
            return f"{key}: ", f"{_unquoted(context['discriminator'])} is missing"
        case "union_tag_invalid":
            known = _unquoted(context["expected_tags"]).split(", ")
            tag = _unquoted(context["discriminator"])
            return _subject(f"{key}.{tag}", _at(raw, [*path, tag])), _not_among(context["tag"], known)
    subject = _subject(key, error["input"])
    match kind:
        case "extra_forbidden":
            owner = _schema(path[:-1], raw, schema)
            if issubclass(owner, Variant) and any(path[-1] in mixer.model_fields for mixer in _MIXERS):
                what = f"stream {path[-1]} to filter" if path[-1] in Landmark.streams else path[-1]
                return subject, f"mixer {_at(raw, path[:-1])['mixer']!r} has no {what}"
            return subject, "unknown key" + (
                nearest(path[-1], owner.model_fields) or f"; known are {', '.join(owner.model_fields)}"
            )
        case "literal_error":
            return subject, _not_among(error["input"], _unquoted(context["expected"]).replace(" or ", ", ").split(", "))
        case "string_pattern_mismatch":
            return subject, PATTERNS[context["pattern"]]
    return subject, _RULES.get(kind) or error["msg"].replace("Input should be", "must be")


def _subject(key: str, value: object) -> str:
    # By its first pieces: what is much longer than a line, or contains itself, is not written out.
    pieces = json.JSONEncoder(default=str, ensure_ascii=False).iterencode(value)
    try:
        shown = "".join(itertools.islice(pieces, 61))
    except (ValueError, RecursionError):
        shown = "..."
    return f"{key or 'the file'} = {_cut(shown, 60)}: "


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."


def _not_among(value: object, known: list[str]) -> str:
    return f"is not {' or '.join(known)}" + nearest(value, known)


def nearest(name: object, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5) if isinstance(name, str) else []
    return f"; did you mean {near[0]!r}?" if near else ""


def _unquoted(text: str) -> str:
    return text.replace("'", "")


def _path(location: tuple[int | str, ...], raw: object, *, missing: bool) -> list[int | str]:
    """`location` without what pydantic adds to it: branches of unions, and the mark that a key is at fault."""
    path: list[int | str] = []
    for place, step in enumerate(location):
        owner = _at(raw, path)
        there = (isinstance(owner, dict) and step in owner) or (isinstance(owner, list) and isinstance(step, int))
        if there or (missing and place == len(location) - 1):
            path.append(step)
    return path


def _schema(path: list[int | str], raw: object, schema: Any) -> Any:
    """The class that describes the mapping at `path` of what is a `schema`."""
    for depth, step in enumerate(path, 1):
        is_class = isinstance(schema, type) and issubclass(schema, Configuration)
        inside = 0 if get_origin(schema) is tuple else 1
        schema = schema.model_fields[step].annotation if is_class else get_args(schema)[inside]
        if get_origin(schema) is Annotated:
            schema = get_args(schema)[0]
        if get_origin(schema) in (Union, UnionType):
            value = _at(raw, path[:depth])
            schema = next(m for m in get_args(schema) if all(value.get(t) in tags for t, tags in _tags(m)))
    return schema


def _tags(member: type[Configuration]) -> Iterator[tuple[str, tuple[str, ...]]]:
    for tag in ("mixer", "kind"):
        if tag in member.model_fields:
            yield tag, get_args(member.model_fields[tag].annotation)


def _at(raw: Any, path: list[int | str]) -> Any:
    for step in path:
        raw = raw[step]
    return raw


Entry = TypeVar("Entry")


def find_entry(section: dict[str, Entry], key: str, name: str) -> Entry:
    """The entry of a section of params.yaml that a command names. Raises ParamsError where there is none."""
    if name not in section:
        raise refusal("params.yaml", [f"{key}.{_cut(name, 60)}: is missing" + nearest(name, section)])
    return section[name]


def to_yaml(value: object, *, flow: bool = True) -> str:
    """A value as params.yaml has it: `flow` in one line, otherwise a mapping or list with a line for each of its entries."""
    writer = YAML()
    writer.default_flow_style, writer.width = flow, 2**31 - 1
    with io.StringIO() as text:
        writer.dump(value, text)
        return text.getvalue().removesuffix("...\n").strip()
