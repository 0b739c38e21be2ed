"""Errors of parameter files, one line each: `file: key = value: problem`.

The wording of type and range errors is pydantic's. This module adds the path of the key, its value, the nearest known name, the
new name of a renamed key, and the words of YAML (mapping, list) for those of Python.
"""

from __future__ import annotations

import difflib
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import TypeAdapter, ValidationError

from cat.config import Config, VariantConfig
from cat.mixers.registry import AnyVariant
from pipeline.config.names import PATTERNS

MAX_CHARACTERS = 300
"""Longest error, without the name of its file."""
MIXER_CONFIGS: tuple[type[VariantConfig], ...] = get_args(get_args(AnyVariant)[0])
_YAML_WORDS = {
    "missing": "is missing",
    "dict_type": "must be a mapping",
    "model_type": "must be a mapping",
    "model_attributes_type": "must be a mapping",
    "tuple_type": "must be a list",
    "invalid_key": "must be a valid string",
}
"""Error types of pydantic whose own message names Python's types."""


class ParamsError(Exception):
    """An invalid parameter file. `lines` has one line per error, which names the key, the value and the problem."""

    def __init__(self, lines: list[str]):
        self.lines = [printable(line) for line in lines]
        super().__init__("\n".join(self.lines))

    def __reduce__(self) -> tuple[type[ParamsError], tuple[list[str]]]:
        return ParamsError, (self.lines,)


def printable(text: str) -> str:
    """Escape line breaks and everything else that is unsafe to print in a terminal."""
    return "".join(letter if letter.isprintable() else json.dumps(letter)[1:-1] for letter in text)


def parse_config(schema: Any, raw: object, file: str | Path) -> Any:
    """Validate `raw` against a Config class, or a mapping to one. Raises ParamsError with every error at once."""
    try:
        return TypeAdapter(schema).validate_python(raw)
    except ValidationError as error:
        found = [(_key_path(detail, raw), detail) for detail in error.errors()]
    with_renamed_key = {
        tuple(path[:-1]) for path, detail in found if detail["type"] == "extra_forbidden" and _new_name(path, raw, schema)
    }
    problems: dict[str, dict[str, None]] = {}
    for path, detail in found:
        if detail["type"] == "missing" and tuple(path[:-1]) in with_renamed_key:
            continue  # the key is present under its old name
        # For a list with a wrong item, pydantic also reports that the list is empty or, in a union, that it is no number.
        inside = any(other[: len(path)] == path and len(other) > len(path) for other, _ in found)
        if not (inside and detail["type"].endswith(("_type", "too_short"))):
            subject, problem = _describe(detail, path, raw, schema)
            problems.setdefault(subject, {})[problem] = None
    # A value that fits no member of a union has one problem per member.
    joined = {subject: " or ".join(members).replace(" or must be ", " or ") for subject, members in problems.items()}
    raise config_error(file, [f"{subject}: {problem}".removeprefix(": ") for subject, problem in joined.items()])


def config_error(file: str | Path, problems: Iterable[str]) -> ParamsError:
    """The error for `file`, with each problem shortened to MAX_CHARACTERS."""
    return ParamsError([f"{file}: {shorten(problem, MAX_CHARACTERS)}" for problem in problems])


def _describe(detail: Any, path: list[int | str], raw: object, schema: Any) -> tuple[str, str]:
    """The subject of one of pydantic's errors, a key and its value, and the problem in one phrase."""
    kind, context = detail["type"], detail.get("ctx", {})
    key = ".".join(shorten(str(step), 60) for step in path)
    match kind:
        case "missing" | "union_tag_not_found":
            return key, _YAML_WORDS["missing"]
        case "value_error":
            return key, str(context["error"])
        case "union_tag_invalid":
            value, known = _value_at(raw, path), context["expected_tags"]
            return _subject(key, value), f"must be one of {known}" + nearest(value, _quoted(known))
        case "extra_forbidden":
            return _subject(key, detail["input"]), _unknown_key(path, raw, schema)
        case "string_pattern_mismatch":
            problem = PATTERNS[context["pattern"]]
        case "literal_error":
            problem = f"must be {context['expected']}" + nearest(detail["input"], _quoted(context["expected"]))
        case _:
            problem = _YAML_WORDS.get(kind) or re.sub(r"^\w+ should", "must", detail["msg"].partition(" after validation")[0])
    return _subject(key, detail["input"]), problem


def _unknown_key(path: list[int | str], raw: object, schema: Any) -> str:
    if (new := _new_name(path, raw, schema)) is not None:
        return f"renamed to {new}"
    owner = _schema_at(path[:-1], raw, schema)
    if issubclass(owner, VariantConfig) and any(path[-1] in mixer.model_fields for mixer in MIXER_CONFIGS):
        return f"mixer {_value_at(raw, path[:-1])['mixer']!r} has no {path[-1]}"
    known = [field.alias or name for name, field in owner.model_fields.items()]
    return "unknown key" + (nearest(path[-1], known) or f"; known are {', '.join(known)}")


def _subject(key: str, value: object) -> str:
    # Only the first pieces of the JSON: the value may be huge or contain itself.
    pieces = json.JSONEncoder(default=str, ensure_ascii=False).iterencode(value)
    try:
        shown = "".join(itertools.islice(pieces, 61))
    except (ValueError, RecursionError):
        shown = "..."
    return f"{key or 'the file'} = {shorten(shown, 60)}"


def shorten(text: str, length: int) -> str:
    """Cut `text` to at most `length` characters."""
    return text if len(text) <= length else text[: length - 3] + "..."


def nearest(name: object, known: Iterable[str]) -> str:
    """`; did you mean ...?` with the known name closest to `name`, or nothing if none is close."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5) if isinstance(name, str) else []
    return f"; did you mean {near[0]!r}?" if near else ""


def _quoted(text: str) -> list[str]:
    return re.findall("'(.*?)'", text)


def _key_path(detail: Any, raw: object) -> list[int | str]:
    """The path of the wrong key: pydantic's location without the names of union members and the mark of an invalid key."""
    path: list[int | str] = []
    location, kind = detail["loc"], detail["type"]
    for place, step in enumerate(location):
        owner = _value_at(raw, path)
        exists = (isinstance(owner, dict) and step in owner) or (isinstance(owner, list) and isinstance(step, int))
        if exists or (kind == "missing" and place == len(location) - 1):
            path.append(step)
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        path += _quoted(detail["ctx"]["discriminator"])
    return path


def _schema_at(path: list[int | str], raw: object, schema: Any) -> Any:
    """The Config class of the mapping at `path`."""
    for depth, step in enumerate(path, 1):
        is_class = isinstance(schema, type) and issubclass(schema, Config)
        inside = 0 if get_origin(schema) is tuple else 1
        schema = schema.model_fields[step].annotation if is_class else get_args(schema)[inside]
        if get_origin(schema) is Annotated:
            schema = get_args(schema)[0]
        if get_origin(schema) in (Union, UnionType):
            value = _value_at(raw, path[:depth])
            schema = next(m for m in get_args(schema) if all(value.get(t) in tags for t, tags in _tags(m)))
    return schema


def _new_name(path: list[int | str], raw: object, schema: Any) -> str | None:
    """The new name of a renamed key; None if the key never existed."""
    new: str | None = _schema_at(path[:-1], raw, schema).renamed_keys.get(path[-1])
    return new


def _tags(member: type[Config]) -> Iterator[tuple[str, tuple[str, ...]]]:
    for tag in ("mixer", "kind"):
        if tag in member.model_fields:
            yield tag, get_args(member.model_fields[tag].annotation)


def _value_at(raw: Any, path: list[int | str]) -> Any:
    for step in path:
        raw = raw[step]
    return raw


Entry = TypeVar("Entry")


def find_entry(section: dict[str, Entry], key: str, name: str) -> Entry:
    """The entry `name` of a section of params.yaml. Raises ParamsError if it does not exist."""
    if name not in section:
        raise config_error("params.yaml", [f"{key}.{shorten(name, 60)}: is missing" + nearest(name, section)])
    return section[name]
