"""The results as one table: every cell of the grid, every seed and length, and nothing else that lies on the disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from pipeline.files import RESULTS, RUNS
from pipeline.grid import cells, variants_on
from pipeline.params import Study

PRIMARY = {"accuracy": "accuracy", "loss": "bits_per_byte"}
"""The metric that stands for a task, by its goal."""


def read_results(study: Study) -> pd.DataFrame:
    """All metrics: task, variant, seed, length, metric, value, and `multiple`, the length in training lengths.

    Raises ValueError where a cell of the grid is missing; rows of variants that left the study are dropped.
    """
    tables = []
    for task, section in study.tasks.items():
        table = pd.read_csv(RESULTS / f"{task}.csv")
        table["multiple"] = table["length"].map(dict(zip(section.data.lengths, section.data.multiples, strict=True)))
        variants = variants_on(study, task)
        for variant in variants:
            seeds = set(table.loc[table["variant"] == variant, "seed"])
            if missing := sorted(set(study.seeds) - seeds):
                raise ValueError(f"results/{task}.csv: variant {variant!r} lacks seed {missing[0]}; run `dvc repro`")
        tables.append(table[table["variant"].isin(variants) & table["seed"].isin(study.seeds)])
    return pd.concat(tables, ignore_index=True)


def primary(study: Study, results: pd.DataFrame) -> pd.DataFrame:
    """Only the metric that stands for each task."""
    metric = results["task"].map({task: PRIMARY[section.data.goal] for task, section in study.tasks.items()})
    return results[results["metric"] == metric]


def read_history(study: Study, task: str, variant: str, learning_rate: float) -> pd.DataFrame:
    """The training curves of a cell at its chosen learning rate."""
    table = pd.read_csv(RUNS / task / variant / "history.csv")
    return table[(table["learning_rate"] == learning_rate) & table["seed"].isin(study.seeds)]


def strays(study: Study) -> Iterator[Path]:
    """Folders of runs that belong to no cell any more."""
    known = {RUNS / cell.task / cell.variant for cell in cells(study)}
    for folder in sorted(RUNS.glob("*/*/")):
        if folder not in known and not folder.name.startswith("."):
            yield folder
