"""The results as one table: every cell of the grid, every seed and length, and nothing else that lies on the disk."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from pipeline.config.grid import cells, variants_on
from pipeline.config.study import Study
from pipeline.storage.paths import FILTERS, POSITIONS, RESULTS, RUNS, SCORES
from pipeline.storage.tables import FILTER_COLUMNS, HISTORY_COLUMNS, POSITION_COLUMNS, RESULTS_COLUMNS, read_table

KEYS = ("task", "variant", "seed", "length", "metric")
"""What identifies a row of the results."""

PRIMARY = {"accuracy": "accuracy", "loss": "bits_per_byte"}
"""The metric that stands for a task, by its goal."""


def read_results(study: Study) -> pd.DataFrame:
    """All metrics: task, variant, seed, length, metric, value, and `multiple`, the length in training lengths.

    Raises ValueError where a cell of the grid is missing or there twice; rows of variants that left the study are dropped.
    """
    tables = []
    for task, section in study.tasks.items():
        path = RESULTS / f"{task}.csv"
        table = read_table(path, RESULTS_COLUMNS)
        table["multiple"] = table["length"].map(dict(zip(section.data.lengths, section.data.multiples, strict=True)))
        variants = variants_on(study, task)
        table = table[table["variant"].isin(variants) & table["seed"].isin(study.seeds)]
        if (twice := table.duplicated([*KEYS])).any():
            raise ValueError(f"{path}: has {', '.join(map(str, table.loc[twice, [*KEYS]].iloc[0]))} twice; run `dvc repro`")
        of_metric = table[table["metric"] == PRIMARY[section.data.goal]]
        there = set(zip(of_metric["variant"], of_metric["seed"], of_metric["length"], strict=True))
        for variant, seed, length in itertools.product(variants, study.seeds, section.data.lengths):
            longest = study.variants[variant].max_length(section.data.length)
            if (longest is None or length <= longest) and (variant, seed, length) not in there:
                raise ValueError(f"{path}: variant {variant!r} lacks seed {seed} at length {length}; run `dvc repro`")
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def primary(study: Study, results: pd.DataFrame) -> pd.DataFrame:
    """Only the metric that stands for each task."""
    metric = results["task"].map({task: PRIMARY[section.data.goal] for task, section in study.tasks.items()})
    return results[results["metric"] == metric]


def read_history(study: Study, task: str, variant: str, learning_rate: float | None = None) -> pd.DataFrame:
    """The training curves of a cell at its chosen learning rate; at all of them for None."""
    table = read_table(RUNS / task / variant / "history.csv", HISTORY_COLUMNS)
    chosen = table["seed"].isin(study.seeds)
    return table[chosen if learning_rate is None else chosen & (table["learning_rate"] == learning_rate)]


def read_filters(task: str) -> pd.DataFrame:
    """The taps of every filter of the variants on the task."""
    return read_table(FILTERS / f"{task}.csv", FILTER_COLUMNS)


def read_positions(task: str) -> pd.DataFrame:
    """The bits per byte of the variants on the task, by position."""
    return read_table(POSITIONS / f"{task}.csv", POSITION_COLUMNS)


def orphans(study: Study) -> Iterator[Path]:
    """Folders of runs that belong to no cell any more, and files of results and scores that belong to no task."""
    known = {RUNS / cell.task / cell.variant for cell in cells(study)}
    for folder in sorted(RUNS.glob("*/*/")):
        if folder not in known and not folder.name.startswith("."):
            yield folder
    for file in itertools.chain.from_iterable(sorted(folder.glob("*.*")) for folder in (RESULTS, FILTERS, POSITIONS, SCORES)):
        if file.stem not in study.tasks and not file.name.startswith("."):
            yield file
