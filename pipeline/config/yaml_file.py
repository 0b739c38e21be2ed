"""Read and write YAML 1.2 with the parser that DVC uses."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML, YAMLError
from ruamel.yaml.error import MarkedYAMLError

from pipeline.config.errors import config_error, shorten


def read_yaml(path: str | Path) -> Any:
    """Parse a YAML file without checking its content. Raises ParamsError if it cannot be read."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        if re.search("[0-9a-fA-F_]{4000}", text):  # Python parses such hexadecimal numbers but cannot print them
            raise ValueError("a number of 4,000 digits or more")
        return YAML(typ="safe").load(text)
    except OSError as error:
        raise config_error(path, [f"{error.strerror}"]) from None
    except UnicodeDecodeError as error:
        raise config_error(path, [f"byte {error.start} is not UTF-8"]) from None
    except YAMLError as error:
        raise config_error(path, [_syntax_error(error)]) from None
    except (ValueError, KeyError, RecursionError) as error:  # an invalid scalar, as the date 2026-02-30
        raise config_error(path, [f"a value cannot be read: {error}"]) from None


def _syntax_error(error: YAMLError) -> str:
    """The place and the reason of a syntax error, without the parser's advice on its own options."""
    if not isinstance(error, MarkedYAMLError) or error.problem_mark is None:
        return " ".join(str(error).split())
    line = f"line {error.problem_mark.line + 1}"
    if key := re.match('found duplicate key "(.*?)" with value', error.problem):
        return f"{line}: key {key[1]!r} appears twice"
    return f"{line}, column {error.problem_mark.column + 1}: {', '.join(filter(None, (error.context, error.problem)))}"


def check_rewritten(path: str | Path) -> None:
    """Check that the file stays readable after `dvc exp run -S` rewrites it. Raises ParamsError."""
    writer = YAML()
    with io.StringIO() as text:
        writer.dump(writer.load(Path(path).read_text(encoding="utf-8")), text)
        try:
            YAML(typ="safe").load(text.getvalue())
        except YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            line = text.getvalue().splitlines()[mark.line].strip() if mark else ""
            problem = "`dvc exp run -S` would rewrite this line without quotes and could not read it again"
            raise config_error(path, [f"{shorten(line, 60)}: {problem}. Fix: use no question mark in braces"]) from None


def to_yaml(value: object, *, flow: bool = True) -> str:
    """Format a value as YAML: in one line with `flow`, otherwise with one line per entry."""
    writer = YAML()
    writer.default_flow_style, writer.width = flow, 2**31 - 1
    with io.StringIO() as text:
        writer.dump(value, text)
        return text.getvalue().removesuffix("...\n").strip()
