"""Patterns of names and texts in parameter files, and the names of the plots."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated

from pydantic import Field, JsonValue

NAME = r"^[a-z0-9][a-z0-9_]{0,39}$"
"""Names become stage names, folders and command lines. Matplotlib hides legend entries that start with an underscore."""
LINE = r"^[^\x00-\x1f\x7f-\x9f\u2028\u2029]+$"
DEVICE = r"^(auto|cpu|cuda(:([0-9]|[1-9][0-9]))?)$"
PLOT = r"^[A-Za-z_][A-Za-z0-9_]*([.][A-Za-z_][A-Za-z0-9_]*)*$"
PATTERNS = {
    NAME: "must be 1 to 40 lowercase letters, digits and underscores, and must not start with an underscore",
    LINE: "must be one line of text",
    DEVICE: "must be auto, cpu, cuda or cuda:N, N from 0 to 99",
    PLOT: "must be the name of a plot, or of a module with your own, such as my_package.my_plot",
}
"""The error message for text that does not match."""
Name = Annotated[str, Field(pattern=NAME)]


@functools.cache
def plot_names() -> tuple[str, ...]:
    """The plots of the program: the files of pipeline/figures/, without that of their base class."""
    files = (Path(__file__).parents[1] / "figures").glob("*.py")
    return tuple(sorted(path.stem for path in files if path.stem not in ("__init__", "base")))


_IN_EDITORS: dict[str, JsonValue] = {"anyOf": [{"enum": [*plot_names()]}, {"pattern": "[.]"}]}
PlotName = Annotated[str, Field(pattern=PLOT, json_schema_extra=_IN_EDITORS)]
"""An editor completes the plots of the program and refuses others, unless the name has a dot."""
