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

from cat.config import Config
from cat.tasks.registry import task_class
from pipeline.config.names import PATTERNS

MAX_CHARACTERS = 300
"""Longest error, without the name of its file."""
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
        found = list(problems_of(error, raw, schema))
    lines = (f"{subject_of(key_of(path), *value) if value else key_of(path)}: {problem}" for path, value, problem in found)
    raise config_error(file, (line.removeprefix(": ") for line in lines))


def key_of(path: Iterable[int | str]) -> str:
    """`tasks.ar.data`: a path with its long steps shortened."""
    return ".".join(shorten(str(step), 60) for step in path)


def problems_of(error: ValidationError, raw: object, schema: Any) -> Iterator[tuple[list[int | str], tuple[Any, ...], str]]:
    """The errors of pydantic: the path of each key, its value or nothing if the problem is not this value, and the problem."""
    found = [(_key_path(detail, raw), detail) for detail in error.errors()]
    with_renamed_key = {
        tuple(path[:-1]) for path, detail in found if detail["type"] == "extra_forbidden" and _new_name(path, raw, schema)
    }
    problems: dict[str, tuple[list[int | str], tuple[Any, ...], dict[str, None]]] = {}
    for path, detail in found:
        if detail["type"] == "missing" and tuple(path[:-1]) in with_renamed_key:
            continue  # the key is present under its old name
        # For a list with a wrong item, pydantic also reports that the list is empty or, in a union, that it is no number.
        inside = any(other[: len(path)] == path and len(other) > len(path) for other, _ in found)
        if not (inside and detail["type"].endswith(("_type", "too_short"))):
            value, problem = _describe(detail, path, raw, schema)
            problems.setdefault(f"{path} {bool(value)}", (path, value, {}))[2][problem] = None
    for path, value, members in problems.values():
        # A value that fits no member of a union has one problem per member.
        yield path, value, " or ".join(members).replace(" or must be ", " or ")


def config_error(file: str | Path, problems: Iterable[str]) -> ParamsError:
    """The error for `file`, with each problem shortened to MAX_CHARACTERS."""
    return ParamsError([f"{file}: {shorten(problem, MAX_CHARACTERS)}" for problem in problems])


def _describe(detail: Any, path: list[int | str], raw: object, schema: Any) -> tuple[tuple[Any, ...], str]:
    """The wrong value of one of pydantic's errors, if there is one, and the problem in one phrase."""
    kind, context = detail["type"], detail.get("ctx", {})
    match kind:
        case "missing" | "union_tag_not_found":
            return (), _YAML_WORDS["missing"]
        case "value_error":
            return (), str(context["error"])
        case "union_tag_invalid":
            value, known = _value_at(raw, path), context["expected_tags"]
            return (value,), f"must be one of {known}" + nearest(value, _quoted(known))
        case "extra_forbidden":
            return (detail["input"],), _unknown_key(path, raw, schema)
        case "string_pattern_mismatch":
            problem = PATTERNS[context["pattern"]]
        case "literal_error":
            problem = f"must be {context['expected']}" + nearest(detail["input"], _quoted(context["expected"]))
        case _:
            problem = _YAML_WORDS.get(kind) or re.sub(r"^\w+ should", "must", detail["msg"].partition(" after validation")[0])
    return (detail["input"],), problem


def _unknown_key(path: list[int | str], raw: object, schema: Any) -> str:
    if (new := _new_name(path, raw, schema)) is not None:
        return f"renamed to {new}"
    owner = _schema_at(path[:-1], raw, schema)
    known = [field.alias or name for name, field in owner.model_fields.items()]
    return "unknown key" + (nearest(path[-1], known) or f"; known are {', '.join(known)}")


def subject_of(key: str, value: object) -> str:
    """`key = value`, with a long value shortened."""
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
    tagged = None
    for place, step in enumerate(location):
        owner = _value_at(raw, path)
        if isinstance(owner, dict) and owner is not tagged and owner.get("kind") == step:
            tagged = owner  # the first step below is the kind, even if the mapping has a key of that name
            continue
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
            schema = _member(get_args(schema), _value_at(raw, path[:depth]))
    return schema


def _member(members: tuple[type[Config], ...], value: dict[str, Any]) -> type[Config]:
    """The member of a union that `value` belongs to; a kind with a dot is a task of another package, which is not a member."""
    if "." in (kind := value.get("kind", "")):
        return task_class(kind)
    return next(m for m in members if all(value.get(t) in tags for t, tags in _tags(m)))


def _new_name(path: list[int | str], raw: object, schema: Any) -> str | None:
    """The new name of a renamed key; None if the key never existed."""
    new: str | None = _schema_at(path[:-1], raw, schema).renamed_keys.get(path[-1])
    return new


def _tags(member: type[Config]) -> Iterator[tuple[str, tuple[str, ...]]]:
    if "kind" in member.model_fields:
        yield "kind", get_args(member.model_fields["kind"].annotation)


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
