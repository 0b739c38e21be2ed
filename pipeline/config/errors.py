"""Errors in parameter files, one line each."""

from __future__ import annotations

import difflib
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import TypeAdapter, ValidationError

from cat.config import Config, VariantConfig
from cat.mixers.landmark.config import LandmarkConfig
from cat.mixers.registry import AnyVariant
from pipeline.config.names import PATTERNS

LONGEST = 300
"""Characters of an error, the name of its file aside."""


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


def parse_config(schema: Any, raw: object, file: str | Path) -> Any:
    """`raw` as a `schema`: a class of configuration, or a mapping to one. Raises ParamsError with every fault that it has."""
    try:
        return TypeAdapter(schema).validate_python(raw)
    except ValidationError as error:
        found = [(_path(fault["loc"], raw, missing=fault["type"] == "missing"), fault) for fault in error.errors()]
        renamed = {
            tuple(path[:-1]) for path, fault in found if fault["type"] == "extra_forbidden" and _new_name(path, raw, schema)
        }
        faults: dict[str, dict[str, None]] = {}
        for path, fault in found:
            if fault["type"] == "missing" and tuple(path[:-1]) in renamed:
                continue  # the new name of a key that is there under its old one
            # A list of names that are wrong is also called empty, and no number, where it may be one.
            inside = any(other[: len(path)] == path and len(other) > len(path) for other, _ in found)
            if not (inside and fault["type"].endswith(("_type", "too_short"))):
                subject, rule = _in_words(fault, path, raw, schema)
                faults.setdefault(subject, {})[rule] = None
        # A key that may be of two kinds breaks a rule of each.
        raise config_error(file, [f"{subject}{', and '.join(rules)}" for subject, rules in faults.items()]) from None


def config_error(file: str | Path, faults: Iterable[str]) -> ParamsError:
    """The error that says what is wrong with `file`, each fault cut to LONGEST characters."""
    return ParamsError([f"{file}: {_cut(fault, LONGEST)}" for fault in faults])


MIXER_CONFIGS: tuple[type[VariantConfig], ...] = get_args(get_args(AnyVariant)[0])

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
            if (new := _new_name(path, raw, schema)) is not None:
                return subject, f"renamed to {new}"
            owner = _schema(path[:-1], raw, schema)
            if issubclass(owner, VariantConfig) and any(path[-1] in mixer.model_fields for mixer in MIXER_CONFIGS):
                what = f"stream {path[-1]} to filter" if path[-1] in LandmarkConfig.projections else path[-1]
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
        is_class = isinstance(schema, type) and issubclass(schema, Config)
        inside = 0 if get_origin(schema) is tuple else 1
        schema = schema.model_fields[step].annotation if is_class else get_args(schema)[inside]
        if get_origin(schema) is Annotated:
            schema = get_args(schema)[0]
        if get_origin(schema) in (Union, UnionType):
            value = _at(raw, path[:depth])
            schema = next(m for m in get_args(schema) if all(value.get(t) in tags for t, tags in _tags(m)))
    return schema


def _new_name(path: list[int | str], raw: object, schema: Any) -> str | None:
    """What a key is called now; None where it never was one."""
    new: str | None = _schema(path[:-1], raw, schema).renamed_keys.get(path[-1])
    return new


def _tags(member: type[Config]) -> Iterator[tuple[str, tuple[str, ...]]]:
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
        raise config_error("params.yaml", [f"{key}.{_cut(name, 60)}: is missing" + nearest(name, section)])
    return section[name]
