"""Thousands of mutated studies: each one is valid and keeps the change, or its short error lines name the key."""

import copy
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cat.tasks.base import _list_lengths
from pipeline.config.claims import Claim
from pipeline.config.errors import MAX_CHARACTERS, ParamsError, parse_config
from pipeline.config.load import SWITCHED_OFF, load_study, without_switched_off
from pipeline.config.names import Name
from pipeline.config.resolve import complete
from pipeline.config.rules import contradictions
from pipeline.config.study import StudyFile
from pipeline.config.yaml_file import read_yaml
from tests.pipeline.config.test_study import ROOT, at, contents, dump, places, plain, run, subject

FILES = ("params.yaml", "presets/smoke.yaml", "presets/paper.yaml", "claims.yaml")
RAW = {file: read_yaml(ROOT / file) for file in FILES}
DROPPED, MISSPELT = Enum("Edit", ["DROPPED", "MISSPELT"])
TEXTS = ["", "x", "none", "a\nb\x1b[31m\u202e", "\ud800", "a" * 300, "../x", "; rm -rf .", "__class__"]
NUMBERS = [True, False, -1, 0, 1, 2, 0.5, 3.0, 1e9, 2**31, 2**63, 10**400, 1e308, math.nan, math.inf, -math.inf]
WRONG = [None, [], {}, [1], [None], {"a": 1}, {1: 2}, *TEXTS, *NUMBERS]
GENERIC = {"tasks", "variants", "ablations", "data", "training"}
"""Steps of a path that do not identify a key."""


def edit(raw: Any, path: tuple, value: Any) -> tuple:
    """Set, drop or misspell what is at `path`. Returns the path of the wrong key."""
    owner, key = at(raw, path[:-1]), path[-1]
    if value is DROPPED:
        del owner[key]
    elif value is MISSPELT and isinstance(owner, dict):
        owner[f"{key}x"] = owner.pop(key)
        return (*path[:-1], f"{key}x")
    elif value is MISSPELT:
        owner[key] = f"{owner[key]}x"
    else:
        owner[key] = value
    return path


@contextmanager
def edited(raw: Any, path: tuple, value: Any) -> Iterator[tuple]:
    """Apply `edit` and undo it at the end."""
    owner = at(raw, path[:-1])
    before = owner.copy()
    try:
        yield edit(raw, path, value)
    finally:
        owner.clear()
        owner.update(before) if isinstance(owner, dict) else owner.extend(before)


def parse(raw: Any, file: str | Path) -> tuple[Any, list[str], bool]:
    """The parsed content in the terms of the file, the error lines, and whether the schema alone refuses it."""
    try:
        if Path(file).name == "claims.yaml":
            claims = parse_config(dict[Name, Claim], raw, file)
            return {name: claim.model_dump(mode="json", exclude_unset=True) for name, claim in claims.items()}, [], False
        sections, switched_off = without_switched_off(raw)
        written = parse_config(StudyFile, sections, file)
    except ParamsError as error:
        return None, error.lines, True
    try:
        lines = ParamsError([f"{file}: {line}" for line in contradictions(complete(written, file))]).lines
    except ParamsError as error:
        lines = error.lines
    kept = written.model_dump(mode="json", exclude_unset=True)
    kept["ablations"] |= dict.fromkeys(switched_off, SWITCHED_OFF)
    return kept, lines, False


def with_listed_lengths(raw: Any) -> Any:
    """`raw` with the list of lengths in place of a range of training lengths."""
    listed = copy.deepcopy(raw)
    for task in listed.get("tasks", {}).values():
        if isinstance(task["data"].get("length"), dict):
            task["data"]["length"] = _list_lengths(task["data"]["length"])
    return listed


def check_errors(raw: Any, file: str | Path) -> tuple[list[str], bool]:
    """Check the form of the error lines of `raw`; a valid `raw` must be kept whole. Returns the lines as `parse` does."""
    parsed, lines, by_schema = parse(raw, file)
    assert lines or plain(parsed) == plain(with_listed_lengths(raw)), "a value was changed or ignored"
    for line in lines:
        assert line.startswith(f"{file}: ")
        assert line.isprintable()
        assert not by_schema or len(line) <= len(f"{file}: ") + MAX_CHARACTERS
        assert not re.search(r"should be|dictionary|tuple|Extra inputs|Field required|\bNone\b|\bTrue\b|\bFalse\b", line), line
    return lines, by_schema


def names(node: Any) -> set[str]:
    """Every key and text in `node`."""
    if isinstance(node, dict):
        return {str(key) for key in node}.union(*map(names, node.values()))
    return set().union(*map(names, node)) if isinstance(node, list) else {node} if isinstance(node, str) else set()


def related_names(raw: Any, path: tuple, value: Any) -> set[str]:
    """Names that a contradiction may mention: those of both values, and all names in the same ablation."""
    return names(at(raw, path)) | names(value) | (names(at(raw, path[:2])) if path[0] == "ablations" else set())


def is_about_path(line: str, file: str | Path, paths: list[tuple]) -> bool:
    """Whether the key of the error is on the way to one of `paths` or below it."""
    key = subject(line, file)
    ways = [tuple(map(str, path)) for path in paths]
    return any(key[: len(way)] == way[: len(key)] for way in ways)


def is_about(line: str, file: str | Path, paths: list[tuple], others: set[str]) -> bool:
    """Whether the error is about one of `paths`, or mentions a step of one of them or one of `others`."""
    words = set(re.findall(r"[\w-]+", line.removeprefix(f"{file}: ")))
    return is_about_path(line, file, paths) or bool(words & ({str(step) for path in paths for step in path} | others) - GENERIC)


def kind_of(raw: Any, path: tuple) -> tuple:
    """Equal for places with the same schema: the section and the keys below an entry."""
    section = path[0] if "tasks" in raw else "claim"
    return (section, tuple(0 if isinstance(step, int) else step for step in path[2:]))


def mutations() -> dict[str, list[tuple[tuple, Any]]]:
    """By file, (path, value). The first place of a kind in all files gets every wrong value, each other place one value."""
    known: set[tuple] = set()
    found: dict[str, list[tuple[tuple, Any]]] = {}
    for file, raw in RAW.items():
        found[file] = []
        for index, path in enumerate(places(raw)):
            kind = kind_of(raw, path)
            one = (DROPPED, MISSPELT, WRONG[index % len(WRONG)])[index % 3]
            values = [one] if kind in known else [DROPPED, MISSPELT, *WRONG]
            known.add(kind)
            found[file] += [(path, value) for value in values]
    return found


MUTATIONS = mutations()


@pytest.mark.parametrize("file", FILES)
def test_one_wrong_key_is_kept_or_refused_by_its_name(file):
    raw, valid = RAW[file], 0
    original = plain(raw)
    for path, value in MUTATIONS[file]:
        others = related_names(raw, path, value)
        # One that is switched off and gets another value is an ablation without a question.
        owners = [path[:2]] if at(raw, path[:2]) == SWITCHED_OFF else []
        with edited(raw, path, value) as wrong:
            lines, by_schema = check_errors(raw, file)
        for line in lines:
            paths = [path, wrong, *owners]
            about = is_about_path(line, file, paths) if by_schema else is_about(line, file, paths, others)
            assert about, (path, value, line)
        valid += not lines
    assert plain(raw) == original
    assert len(MUTATIONS[file]) > 400
    assert 0 < valid < len(MUTATIONS[file]) / 2


@st.composite
def several(draw: st.DrawFn, file: str) -> list[tuple[tuple, Any]]:
    """Two to four changes, some to arbitrary values."""
    anything = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.sampled_from([*TEXTS, *NUMBERS]),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=5,
    )
    place = st.sampled_from(list(places(RAW[file])))
    # Values from elsewhere in the file are the likeliest contradictions.
    value = st.sampled_from([DROPPED, MISSPELT]) | place.map(lambda path: at(RAW[file], path)) | anything
    return draw(st.lists(st.tuples(place, value), min_size=2, max_size=4))


WRITTEN = 8
"""Mutated studies per file that are also written to YAML and loaded again."""


@pytest.mark.parametrize("file", ["presets/smoke.yaml", "claims.yaml"])
def test_several_wrong_keys_are_refused_by_name_in_memory_and_in_a_file(file, tmp_path):
    written = tmp_path / Path(file).name
    seen, loaded = set(), 0

    @settings(derandomize=True, deadline=None, database=None, max_examples=120)
    @given(several(file))
    def check(changes):
        nonlocal loaded
        raw, paths, others = copy.deepcopy(RAW[file]), [], set()
        for path, value in changes:
            try:
                others |= related_names(raw, path, value)
                paths += [path, edit(raw, path, copy.deepcopy(value))]
            except (KeyError, IndexError, TypeError, AttributeError):
                continue  # an earlier change removed this place
        lines, _ = check_errors(raw, written)
        assert all(is_about(line, written, paths, others) for line in lines), lines
        seen.add(repr(raw))
        if len(seen) % 15 == 0 and loaded < WRITTEN:
            try:
                dump(raw, written)
            except UnicodeEncodeError:  # half of a surrogate pair
                return
            assert check_errors(read_yaml(written), written)[0] == lines
            loaded += 1

    check()
    assert len(seen) > 80
    assert loaded > 2


@pytest.mark.parametrize(
    ("file", "key", "arguments"),
    [
        ("params.yaml", "data_seed", ("validate",)),
        ("params.yaml", "variants.k.width", ("train", "ar", "k")),
        ("claims.yaml", "cat_solves_recall.baseline", ("plan",)),
    ],
)
def test_a_wrong_file_ends_a_command_before_it_does_anything(file, key, arguments, tmp_path):
    for name, source in (("params.yaml", "presets/smoke.yaml"), ("claims.yaml", "claims.yaml")):
        raw = copy.deepcopy(RAW[source])
        if name == file:
            edit(raw, tuple(key.split(".")), "a\nb")
        dump(raw, tmp_path / name)
    before = contents(tmp_path)
    result = run("-m", "pipeline", *arguments, cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert re.fullmatch(rf'{file}: {re.escape(key)} = "a\\nb": must be a [^\n]+\n', result.stderr), result.stderr
    assert contents(tmp_path) == before


def test_a_number_that_python_cannot_print_is_refused(tmp_path):
    (tmp_path / "a.yaml").write_text(f"data_seed: 0x{'f' * 5000}\n")
    with pytest.raises(ParamsError) as error:
        load_study(tmp_path / "a.yaml")
    assert error.value.lines == [f"{tmp_path}/a.yaml: a value cannot be read: a number of 4,000 digits or more"]


def test_an_exponentially_large_value_is_not_printed(tmp_path):
    lines = ["a0: &a0 [x, x]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 60))]
    (tmp_path / "a.yaml").write_text("\n".join(lines))
    with pytest.raises(ParamsError) as error:
        load_study(tmp_path / "a.yaml")
    assert any(line.startswith(f"{tmp_path}/a.yaml: a59 = [[[[") for line in error.value.lines)


def test_a_long_error_is_shortened():
    raw = copy.deepcopy(RAW["params.yaml"])
    raw["tasks"]["ar"]["training"]["seeds"] = [*range(500), 0]
    (line,), _ = check_errors(raw, "params.yaml")
    assert line.startswith("params.yaml: tasks.ar.training: seeds = [0, 1, 2")
    assert len(line) == len("params.yaml: ") + MAX_CHARACTERS
