"""Read the results of the study as tables.

The tables follow the grid, not the disk: they hold every cell, seed and length of the study and nothing else.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from pipeline.config.grid import cells, seeds_of, variants_on
from pipeline.config.study import Study
from pipeline.storage.paths import FILTERS, RATES, REFERENCES, RESULTS, RUNS, SCORES
from pipeline.storage.tables import (
    FILTER_COLUMNS,
    HISTORY_COLUMNS,
    PRIMARY,
    RATE_COLUMNS,
    REFERENCE_COLUMNS,
    RESULTS_COLUMNS,
    read_table,
)

KEYS = ("task", "variant", "seed", "length", "metric")
"""Columns that identify a row of the results."""


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
        table = in_grid(study, task, table)
        if (duplicates := table.duplicated([*KEYS])).any():
            first = ", ".join(map(str, table.loc[duplicates, [*KEYS]].iloc[0]))
            raise ValueError(f"{path}: {first}: duplicate row; run `dvc repro`")
        scores = table[table["metric"] == PRIMARY[section.data.goal]]
        present = set(zip(scores["variant"], scores["seed"], scores["length"], strict=True))
        for variant in variants:
            limit = study.variants[variant].max_length(section.data.length)
            for seed, length in itertools.product(seeds_of(study, task, variant), section.data.lengths):
                if (limit is None or length <= limit) and (variant, seed, length) not in present:
                    raise ValueError(f"{path}: variant {variant!r} lacks seed {seed} at length {length}; run `dvc repro`")
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def in_grid(study: Study, task: str, table: pd.DataFrame) -> pd.DataFrame:
    """Keep the rows of the variants and seeds that the study has on `task`."""
    runs = {(variant, seed) for variant in variants_on(study, task) for seed in seeds_of(study, task, variant)}
    return table[[run in runs for run in zip(table["variant"], table["seed"], strict=True)]]


def primary(study: Study, results: pd.DataFrame) -> pd.DataFrame:
    """Keep only the primary metric of each task."""
    metric = results["task"].map({task: PRIMARY[section.data.goal] for task, section in study.tasks.items()})
    return results[results["metric"] == metric]


def read_history(study: Study, task: str, variant: str, learning_rate: float | None = None) -> pd.DataFrame:
    """Read the training curves of a cell at `learning_rate`, or at all learning rates if None."""
    table = read_table(RUNS / task / variant / "history.csv", HISTORY_COLUMNS)
    selected = table["seed"].isin(seeds_of(study, task, variant))
    return table[selected if learning_rate is None else selected & (table["learning_rate"] == learning_rate)]


def read_filters(task: str) -> pd.DataFrame:
    """Read the kernel values of all filters of the variants on `task`."""
    return read_table(FILTERS / f"{task}.csv", FILTER_COLUMNS)


def read_rates(task: str) -> pd.DataFrame:
    """Read the scores of the variants on `task` at every learning rate."""
    return read_table(RATES / f"{task}.csv", RATE_COLUMNS)


def read_references(study: Study) -> pd.DataFrame:
    """Read the scores of the partial strategies of every task, in the order of the study, weakest first within a task.

    There is one row per task, reference and test length. The label of a reference is `reference_labels[reference]` of its task.
    Raises ValueError if a row is missing.
    """
    tables = []
    for task, section in study.tasks.items():
        path = REFERENCES / f"{task}.csv"
        table = read_table(path, REFERENCE_COLUMNS).set_index(["reference", "length"], drop=False)
        expected = list(itertools.product(section.data.reference_names, section.data.lengths))
        for name, length in expected:
            if (name, length) not in table.index:
                raise ValueError(f"{path}: lacks {name} at length {length}; run `dvc repro`")
        tables.append(table[table.index.isin(expected)])
    return pd.concat(tables, ignore_index=True)


def orphans(study: Study) -> Iterator[Path]:
    """Find run folders without a cell in the study, and result files without a task."""
    expected = {RUNS / cell.task / cell.variant for cell in cells(study)}
    for folder in sorted(RUNS.glob("*/*/")):
        if folder not in expected and not folder.name.startswith("."):
            yield folder
    folders = (RESULTS, FILTERS, RATES, REFERENCES, SCORES)
    for file in itertools.chain.from_iterable(sorted(folder.glob("*.*")) for folder in folders):
        if file.stem not in study.tasks and not file.name.startswith("."):
            yield file
