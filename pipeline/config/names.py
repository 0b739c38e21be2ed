"""Patterns of names and texts in parameter files."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

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
