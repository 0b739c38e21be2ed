"""Read and write YAML 1.2 with the parser that DVC uses."""

from __future__ import annotations

import io
import re
import traceback
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML, YAMLError
from ruamel.yaml.constructor import SafeConstructor
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.nodes import Node

from pipeline.config.errors import config_error, shorten


class _Constructor(SafeConstructor):  # type: ignore[misc]
    """Without sets, which DVC refuses with a traceback."""


_Constructor.add_constructor("tag:yaml.org,2002:set", SafeConstructor.construct_undefined)


def read_yaml(path: str | Path) -> Any:
    """Parse a YAML file without checking its content. Raises ParamsError if it cannot be read."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        if re.search("[0-9a-fA-F_]{4000}", text):  # Python parses such hexadecimal numbers but cannot print them
            raise ValueError("a number of 4,000 digits or more")
        reader = YAML(typ="safe")
        reader.Constructor = _Constructor
        return reader.load(text)
    except OSError as error:
        raise config_error(path, [f"{error.strerror}"]) from None
    except UnicodeDecodeError as error:
        raise config_error(path, [f"byte {error.start} is not UTF-8"]) from None
    except Exception as error:  # the parser also raises errors of Python, as for the date 2026-02-30
        raise config_error(path, [_reason(error)]) from None


def _reason(error: Exception) -> str:
    """The place and the reason of an error, without the parser's advice on its own options."""
    if isinstance(error, MarkedYAMLError) and error.problem_mark is not None:
        if key := re.match('found duplicate key "(.*?)" with value', error.problem or ""):
            return f"line {error.problem_mark.line + 1}: key {key[1]!r} appears twice"
        return f"{_place(error.problem_mark)}: {', '.join(filter(None, (error.context, error.problem)))}"
    if isinstance(error, YAMLError):
        return " ".join(str(error).split())
    # An error of Python has no place, but the parser's functions have the part of the file that they were reading.
    nodes = [frame.f_locals.get("node") for frame, _ in traceback.walk_tb(error.__traceback__)]
    marks = [node.start_mark for node in nodes if isinstance(node, Node) and node.start_mark is not None]
    problem = "is nested too deeply" if isinstance(error, RecursionError) else f"cannot be read: {error}"
    return f"{_place(marks[-1])}: a value {problem}" if marks else f"a value {problem}"


def _place(mark: Any) -> str:
    return f"line {mark.line + 1}, column {mark.column + 1}"


def check_rewritten(path: str | Path) -> None:
    """Check that the file keeps its values when `dvc exp run -S` rewrites it. Raises ParamsError."""
    before, writer = read_yaml(path), YAML()
    try:
        content = writer.load(Path(path).read_text(encoding="utf-8"))
    except Exception as error:  # this parser keeps comments; it does not read all that the other one reads
        reason = _reason(error)
        fix = "use spaces, not tabs" if re.search(r"\\t|\btab\b", reason) else "write it in another way"
        raise config_error(path, [f"{shorten(reason, 150)}; `dvc exp run -S` could not read the file. Fix: {fix}"]) from None
    with io.StringIO() as text:
        try:
            writer.dump(content, text)
            after = YAML(typ="safe").load(text.getvalue())
        except Exception as error:
            if (mark := getattr(error, "problem_mark", None)) is None:
                problem = f"`dvc exp run -S` could not rewrite the file: {shorten(_reason(error), 150)}"
                raise config_error(path, [f"{problem}. Fix: write it as plain YAML 1.2"]) from None
            lines = [*text.getvalue().splitlines(), ""]
            line = shorten(lines[min(mark.line, len(lines) - 1)].strip(), 60)
            fix = "use no question mark in braces" if "?" in line else "write it without braces"
            problem = "`dvc exp run -S` would rewrite this line without quotes and could not read it again"
            raise config_error(path, [f"{line}: {problem}. Fix: {fix}"]) from None
    for key, value in before.items() if isinstance(before, dict) else ():
        if repr(value) != repr(after.get(key)):  # the text, because nan differs from itself
            problem = "`dvc exp run -S` would change a value in it when it rewrites the file"
            raise config_error(path, [f"{shorten(str(key), 60)}: {problem}. Fix: write it as plain YAML 1.2"])


def to_yaml(value: object, *, flow: bool = True) -> str:
    """Format a value as YAML: in one line with `flow`, otherwise with one line per entry."""
    writer = YAML()
    writer.default_flow_style, writer.width = flow, 2**31 - 1
    with io.StringIO() as text:
        writer.dump(value, text)
        return text.getvalue().removesuffix("...\n").strip()
