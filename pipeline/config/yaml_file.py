"""Reading and writing YAML 1.2, as DVC does."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML, YAMLError
from ruamel.yaml.error import MarkedYAMLError

from pipeline.config.errors import _cut, config_error


def read_yaml(path: str | Path) -> Any:
    """What a YAML file says, unchecked. Raises ParamsError where it cannot be read."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        if re.search("[0-9a-fA-F_]{4000}", text):  # Python refuses to write out what it reads of an octal or hexadecimal one
            raise ValueError("a number of 4,000 digits or more")
        return YAML(typ="safe").load(text)
    except OSError as error:
        raise config_error(path, [f"{error.strerror}"]) from None
    except UnicodeDecodeError as error:
        raise config_error(path, [f"byte {error.start} is not UTF-8"]) from None
    except YAMLError as error:
        raise config_error(path, [_misread(error)]) from None
    except (ValueError, KeyError, RecursionError) as error:  # of a scalar that is not what it looks like, as 2026-02-30
        raise config_error(path, [f"a value cannot be read: {error}"]) from None


def _misread(error: YAMLError) -> str:
    """Where the parser stopped and why, without its advice to make it more lenient."""
    if not isinstance(error, MarkedYAMLError) or error.problem_mark is None:
        return " ".join(str(error).split())
    place = f"line {error.problem_mark.line + 1}"
    if key := re.match('found duplicate key "(.*?)" with value', error.problem):
        return f"{place}: key {key[1]!r} twice"
    return f"{place}, column {error.problem_mark.column + 1}: {', '.join(filter(None, (error.context, error.problem)))}"


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
            raise config_error(path, [f"{_cut(line, 60)}: {what}"]) from None


def to_yaml(value: object, *, flow: bool = True) -> str:
    """A value as params.yaml has it: `flow` in one line, otherwise a mapping or list with a line for each of its entries."""
    writer = YAML()
    writer.default_flow_style, writer.width = flow, 2**31 - 1
    with io.StringIO() as text:
        writer.dump(value, text)
        return text.getvalue().removesuffix("...\n").strip()
