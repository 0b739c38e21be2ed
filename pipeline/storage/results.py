"""Read the results of the study as tables.

The tables follow the grid, not the disk: they hold every cell, seed and length of the study and nothing else.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from pipeline.config.grid import cells, variants_on
from pipeline.config.study import Study
from pipeline.storage.paths import FILTERS, POSITIONS, REFERENCES, RESULTS, RUNS, SCORES
from pipeline.storage.tables import (
    FILTER_COLUMNS,
    HISTORY_COLUMNS,
    POSITION_COLUMNS,
    REFERENCE_COLUMNS,
    RESULTS_COLUMNS,
    read_table,
)

KEYS = ("task", "variant", "seed", "length", "metric")
"""Columns that identify a row of the results."""

PRIMARY = {"accuracy": "accuracy", "loss": "bits_per_byte"}
"""Goal of a task -> its primary metric."""


def read_results(study: Study) -> pd.DataFrame:
    """Read all metrics, with `multiple`: the test length divided by the training length.

    Rows of variants and seeds that are not in the study are dropped. Raises ValueError if a row is missing or duplicated.
    """
    tables = []
    for task, section in study.tasks.items():
        path = RESULTS / f"{task}.csv"
        table = read_table(path, RESULTS_COLUMNS)
        table["multiple"] = table["length"].map(dict(zip(section.data.lengths, section.data.multiples, strict=True)))
        variants = variants_on(study, task)
        table = table[table["variant"].isin(variants) & table["seed"].isin(study.seeds)]
        if (duplicates := table.duplicated([*KEYS])).any():
            first = ", ".join(map(str, table.loc[duplicates, [*KEYS]].iloc[0]))
            raise ValueError(f"{path}: {first}: duplicate row; run `dvc repro`")
        scores = table[table["metric"] == PRIMARY[section.data.goal]]
        present = set(zip(scores["variant"], scores["seed"], scores["length"], strict=True))
        for variant, seed, length in itertools.product(variants, study.seeds, section.data.lengths):
            limit = study.variants[variant].max_length(section.data.length)
            if (limit is None or length <= limit) and (variant, seed, length) not in present:
                raise ValueError(f"{path}: variant {variant!r} lacks seed {seed} at length {length}; run `dvc repro`")
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def primary(study: Study, results: pd.DataFrame) -> pd.DataFrame:
    """Keep only the primary metric of each task."""
    metric = results["task"].map({task: PRIMARY[section.data.goal] for task, section in study.tasks.items()})
    return results[results["metric"] == metric]


def read_history(study: Study, task: str, variant: str, learning_rate: float | None = None) -> pd.DataFrame:
    """Read the training curves of a cell at `learning_rate`, or at all learning rates if None."""
    table = read_table(RUNS / task / variant / "history.csv", HISTORY_COLUMNS)
    selected = table["seed"].isin(study.seeds)
    return table[selected if learning_rate is None else selected & (table["learning_rate"] == learning_rate)]


def read_filters(task: str) -> pd.DataFrame:
    """Read the kernel values of all filters of the variants on `task`."""
    return read_table(FILTERS / f"{task}.csv", FILTER_COLUMNS)


def read_positions(task: str) -> pd.DataFrame:
    """Read the bits per byte of the variants on `task` by position."""
    return read_table(POSITIONS / f"{task}.csv", POSITION_COLUMNS)


def read_references(study: Study) -> pd.DataFrame:
    """Read the scores of the references that the tasks state."""
    tasks = [task for task, section in study.tasks.items() if section.data.reference_names]
    if not tasks:
        return pd.DataFrame(columns=[*REFERENCE_COLUMNS])
    return pd.concat([read_table(REFERENCES / f"{task}.csv", REFERENCE_COLUMNS) for task in tasks], ignore_index=True)


def orphans(study: Study) -> Iterator[Path]:
    """Find run folders without a cell in the study, and result files without a task."""
    expected = {RUNS / cell.task / cell.variant for cell in cells(study)}
    for folder in sorted(RUNS.glob("*/*/")):
        if folder not in expected and not folder.name.startswith("."):
            yield folder
    for file in itertools.chain.from_iterable(
        sorted(folder.glob("*.*")) for folder in (RESULTS, FILTERS, POSITIONS, REFERENCES, SCORES)
    ):
        if file.stem not in study.tasks and not file.name.startswith("."):
            yield file
