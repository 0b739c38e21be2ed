"""Patterns of names and texts in parameter files."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

NAME = r"^[a-z0-9][a-z0-9_]{0,39}$"
"""Names become stage names, folders and command lines. Matplotlib hides legend entries that start with an underscore."""
LINE = r"^[^\x00-\x1f\x7f-\x9f\u2028\u2029]+$"
DEVICE = r"^(auto|cpu|cuda(:([0-9]|[1-9][0-9]))?)$"
PATTERNS = {
    NAME: "must be 1 to 40 lowercase letters, digits and underscores, and must not start with an underscore",
    LINE: "must be one line of text",
    DEVICE: "must be auto, cpu, cuda or cuda:N, N from 0 to 99",
}
"""The error message for text that does not match."""
Name = Annotated[str, Field(pattern=NAME)]
