"""Scores that a task states, such as that of guessing, as thin grey lines with their words in the legend."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pandas as pd
from matplotlib.axes import Axes

from pipeline.config.grid import shown_tasks
from pipeline.config.study import Ablation, Study

GREYS = ("0.3", "0.5", "0.65")
DASHES = ((5, 2), (5, 2, 1, 2), (9, 3), (5, 2, 1, 2, 1, 2))
"""Dashes and gaps in line widths, none dotted like a construction. 3 and 4 have no common factor: twelve lines differ."""


def reference_words(study: Study, ablation: Ablation) -> dict[str, str]:
    """Reference -> its words, or its name if tasks of the figure have different words for it; only those that a task states."""
    stated = [study.tasks[task].data.reference_labels for task in shown_tasks(study, ablation)]
    words = {name: {labels[name] for labels in stated if name in labels} for name in ablation.reference_lines}
    return {name: min(labels) if len(labels) == 1 else name.replace("_", " ") for name, labels in words.items() if labels}


def draw_by_length(study: Study, ablation: Ablation, references: pd.DataFrame, axes: Axes) -> None:
    """Draw the scores in `references` against their length: one line per reference."""
    for index, label, rows in _lines(study, ablation, references):
        rows = rows.sort_values("multiple")
        axes.plot(rows["multiple"], rows["value"], label=label, **_style(index))


def draw_levels(study: Study, ablation: Ablation, references: pd.DataFrame, axes: Axes) -> None:
    """Draw the scores in `references` as horizontal lines: one per reference and, if its scores differ, per shown length."""
    multiples = study.evaluate.multiples
    for index, label, rows in _lines(study, ablation, references[references["multiple"].isin(multiples)]):
        by_multiple = rows.set_index("multiple")["value"]
        if by_multiple.nunique() == 1:
            axes.axhline(by_multiple.iloc[0], label=label, **_style(index))
            continue
        for shift, (multiple, value) in enumerate(by_multiple.items()):
            name = f"{label}, at {multiple:g}x length"
            axes.axhline(value, label=name, **_style(index + shift * len(ablation.reference_lines)))


def _lines(study: Study, ablation: Ablation, references: pd.DataFrame) -> Iterator[tuple[int, str, pd.DataFrame]]:
    """The number, the words and the rows of each reference that has a score in `references`."""
    for index, (name, label) in enumerate(reference_words(study, ablation).items()):
        rows = references[references["reference"] == name].dropna(subset="value")
        if len(rows):
            yield index, label, rows


def _style(index: int) -> dict[str, Any]:
    return {"color": GREYS[index % len(GREYS)], "linestyle": (0, DASHES[index % len(DASHES)]), "lw": 1.1, "zorder": 1}
