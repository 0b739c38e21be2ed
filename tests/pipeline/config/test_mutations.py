"""Thousands of wrong files: each is a valid study that shows the change, or is refused in short lines that name the key."""

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

from pipeline.config.claims import Claim
from pipeline.config.errors import LONGEST, ParamsError, parse_config
from pipeline.config.load import load_study, study_of
from pipeline.config.names import Name
from pipeline.config.yaml_file import read_yaml
from tests.pipeline.config.test_study import ROOT, at, contents, dump, places, plain, run, subject

FILES = ("params.yaml", "presets/smoke.yaml", "presets/paper.yaml", "claims.yaml")
RAW = {file: read_yaml(ROOT / file) for file in FILES}
DROPPED, MISSPELT = Enum("Edit", ["DROPPED", "MISSPELT"])
TEXTS = ["", "x", "none", "a\nb\x1b[31m\u202e", "\ud800", "a" * 300, "../x", "; rm -rf .", "__class__"]
NUMBERS = [True, False, -1, 0, 1, 2, 0.5, 3.0, 1e9, 2**31, 2**63, 10**400, 1e308, math.nan, math.inf, -math.inf]
WRONG = [None, [], {}, [1], [None], {"a": 1}, {1: 2}, *TEXTS, *NUMBERS]
GENERIC = {"tasks", "variants", "ablations", "data", "train"}
"""Words of a path that say nothing about where it leads."""


def edit(raw: Any, path: tuple, value: Any) -> tuple:
    """Sets, drops or misspells what is at `path`; gives the path of what is wrong then."""
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
    """As `edit`, undone at the end."""
    owner = at(raw, path[:-1])
    before = owner.copy()
    try:
        yield edit(raw, path, value)
    finally:
        owner.clear()
        owner.update(before) if isinstance(owner, dict) else owner.extend(before)


def read_as(raw: Any, file: str | Path) -> Any:
    """What is read of a file, in the terms of the file. Raises ParamsError."""
    if Path(file).name == "claims.yaml":
        read = parse_config(dict[Name, Claim], raw, file)
        return {name: claim.model_dump(mode="json", exclude_unset=True) for name, claim in read.items()}
    return study_of(raw, file).model_dump(mode="json", exclude_unset=True)


def refusal(raw: Any, file: str | Path) -> list[str]:
    """The lines by which `raw` is refused; none where it is valid, and then all of it is there."""
    try:
        read, lines = read_as(raw, file), []
    except ParamsError as error:
        read, lines = None, error.lines
    assert lines or plain(read) == plain(raw), "a value was changed or ignored"
    for line in lines:
        assert line.startswith(f"{file}: ")
        assert line.isprintable()
        assert len(line) <= len(f"{file}: ") + LONGEST
        assert not re.search(r"Input should|valid (string|dict|int)|\bNone\b|\bTrue\b|\bFalse\b", line)
    return lines


def names(node: Any) -> set[str]:
    """Every name and text in it."""
    if isinstance(node, dict):
        return {str(key) for key in node}.union(*map(names, node.values()))
    return set().union(*map(names, node)) if isinstance(node, list) else {node} if isinstance(node, str) else set()


def concerned(raw: Any, path: tuple, value: Any) -> set[str]:
    """What a contradiction may be told by: the names of the values, and all that the same ablation says."""
    return names(at(raw, path)) | names(value) | (names(at(raw, path[:2])) if path[0] == "ablations" else set())


def is_about(line: str, file: str | Path, paths: list[tuple], others: set[str]) -> bool:
    """Whether the line's key is on the way to one of `paths` or below it, or its rule names one of them, or one of `others`."""
    key = subject(line, file)
    for path in paths:
        way = tuple(map(str, path))
        if key[: len(way)] == way[: len(key)]:
            return True
    words = set(re.findall(r"[\w-]+", line.removeprefix(f"{file}: ")))
    return bool(words & ({str(step) for path in paths for step in path} | others) - GENERIC)


def cases(file: str) -> Iterator[tuple[tuple, Any]]:
    """Each path dropped, misspelt and, the first place of its kind, with all else that is wrong; a share of that elsewhere."""
    raw, known = RAW[file], set()
    preset = file.startswith("presets")  # says little that params.yaml does not

    def tag(path: tuple) -> Any:
        node = at(raw, path)
        return node.get("mixer", node.get("kind")) if isinstance(node, dict) else None

    for place, path in enumerate(list(places(raw))):
        kind = (path[0], tuple(0 if isinstance(step, int) else step for step in path[2:]), *map(tag, (path[:2], path[:-1])))
        step = len(WRONG) if kind in known else 8 if preset else 1
        known.add(kind)
        for value in [*([DROPPED, MISSPELT][place % 2 :: 2 if preset else 1]), *WRONG[place % step :: step]]:
            yield path, value


@pytest.mark.parametrize("file", FILES)
def test_whatever_is_wrong_with_one_key_is_shown_or_refused_by_its_name(file):
    raw, seen, valid = RAW[file], 0, 0
    original = plain(raw)

    for path, value in list(cases(file)):
        others = concerned(raw, path, value)
        with edited(raw, path, value) as wrong:
            lines = refusal(raw, file)
        assert all(is_about(line, file, [path, wrong], others) for line in lines), (path, value, lines)
        seen += 1
        valid += not lines
    assert plain(raw) == original
    assert seen > 1000
    assert 0 < valid < seen / 2


@st.composite
def several(draw: st.DrawFn, file: str) -> list[tuple[tuple, Any]]:
    """Two to four changes at a time, some to values that nobody thought of."""
    anything = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.sampled_from([*TEXTS, *NUMBERS]),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=5,
    )
    place = st.sampled_from(list(places(RAW[file])))
    # What stands elsewhere in the file is the likeliest contradiction.
    value = st.sampled_from([DROPPED, MISSPELT]) | place.map(lambda path: at(RAW[file], path)) | anything
    return draw(st.lists(st.tuples(place, value), min_size=2, max_size=4))


@pytest.mark.parametrize("file", ["presets/smoke.yaml", "claims.yaml"])
def test_whatever_is_wrong_with_several_keys_is_refused_alike_in_a_file(file, tmp_path):
    written = tmp_path / Path(file).name
    seen = set()

    @settings(derandomize=True, deadline=None, database=None, max_examples=120)
    @given(several(file))
    def check(changes):
        raw, paths, others = copy.deepcopy(RAW[file]), [], set()
        for path, value in changes:
            try:
                others |= concerned(raw, path, value)
                paths += [path, edit(raw, path, copy.deepcopy(value))]
            except (KeyError, IndexError, TypeError, AttributeError):
                continue  # an earlier change has taken the place away
        lines = refusal(raw, written)
        assert all(is_about(line, written, paths, others) for line in lines), lines
        seen.add(repr(raw))
        try:
            dump(raw, written)
        except UnicodeEncodeError:  # half of a character
            return
        assert refusal(read_yaml(written), written) == lines

    check()
    assert len(seen) > 80


@pytest.mark.parametrize(
    ("file", "key", "arguments"),
    [
        ("params.yaml", "seeds", ("validate",)),
        ("params.yaml", "variants.k.width", ("train", "ar", "k")),
        ("claims.yaml", "cat_solves_recall.than", ("plan",)),
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
    assert re.fullmatch(rf'{file}: {re.escape(key)} = "a\\nb": is not a [^\n]+\n', result.stderr), result.stderr
    assert contents(tmp_path) == before


def test_a_number_that_python_does_not_write_out_is_refused(tmp_path):
    (tmp_path / "a.yaml").write_text(f"data_seed: 0x{'f' * 5000}\n")
    with pytest.raises(ParamsError) as error:
        load_study(tmp_path / "a.yaml")
    assert error.value.lines == [f"{tmp_path}/a.yaml: a value cannot be read: a number of 4,000 digits or more"]


def test_what_doubles_with_every_line_is_not_written_out(tmp_path):
    lines = ["a0: &a0 [x, x]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 60))]
    (tmp_path / "a.yaml").write_text("\n".join(lines))
    with pytest.raises(ParamsError) as error:
        load_study(tmp_path / "a.yaml")
    assert any(line.startswith(f"{tmp_path}/a.yaml: a59 = [[[[") for line in error.value.lines)


def test_a_long_fault_is_cut():
    raw = copy.deepcopy(RAW["params.yaml"])
    raw["seeds"] = [*range(500), 0]
    (line,) = refusal(raw, "params.yaml")
    assert line.startswith("params.yaml: seeds = [0, 1, 2")
    assert len(line) == len("params.yaml: ") + LONGEST
