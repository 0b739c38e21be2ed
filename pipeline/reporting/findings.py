"""What an ablation found, in one line per task."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pandas as pd

from cat.config import ModelConfig
from pipeline.config.grid import shown_on, shown_tasks
from pipeline.config.study import Ablation, Study
from pipeline.reporting.labels import task_label, variant_label

SOLVED = 0.99
"""Accuracy from which a run has solved a task at one length."""


def findings(study: Study, scores: pd.DataFrame, ablation: Ablation) -> str:
    """Return one line of Markdown per task of an ablation: which variants solve it, or which has the fewest bits per byte.

    `scores` has the primary metric of each task, with the columns of `read_results`. Constructions are left out, because they
    are not trained.
    """
    lines = []
    for task in shown_tasks(study, ablation):
        trained = [name for name in shown_on(study, ablation, task) if isinstance(study.variants[name], ModelConfig)]
        table = scores[(scores["task"] == task) & scores["variant"].isin(trained)]
        table = table[table["multiple"].isin(study.evaluate.multiples)]
        if len(table):
            found = _solved(study, table) if study.tasks[task].data.goal == "accuracy" else _lowest(study, table)
            lines.append(f"* {task_label(study, task)}. {' '.join(found)}")
    return "\n".join(lines)


def _solved(study: Study, table: pd.DataFrame) -> Iterator[str]:
    """Yield the variants that solve the task with every seed, those that do with some seeds, and the best of the others."""
    runs = table.assign(solved=table["value"] >= SOLVED).groupby(["variant", "multiple"])["solved"].agg(["sum", "size"])
    runs = runs.unstack().reindex(table["variant"].unique())
    solved, count = runs["sum"], runs["size"]
    every = (solved == count).apply(lambda row: tuple(row.index[row]), axis=1)
    for lengths in sorted({lengths for lengths in every if lengths}, key=lambda lengths: (-len(lengths), lengths)):
        only = "" if len(lengths) == len(solved.columns) else " only"
        yield f"Solved at {_multiples(lengths)}{only} with every seed: {_names(study, every.index[every == lengths])}."
    rest = every.index[every == ()]
    some = [name for name in rest if solved.loc[name].any()]
    if some:
        counts = [f"{variant_label(study, name)} ({_share(solved.loc[name], count.loc[name])})" for name in some]
        yield f"Solved with some seeds: {'; '.join(counts)}."
    failed = table[table["variant"].isin(rest) & ~table["variant"].isin(some)]
    if len(failed):
        means = failed.groupby(["variant", "multiple"])["value"].mean().unstack()
        best = means.iloc[:, 0].idxmax()
        which = "Not solved" if len(means) == 1 else f"Best of {'' if len(means) == len(every) else 'the other '}{len(means)}"
        scores = means.loc[best].dropna()  # learned positions have no score beyond the training length
        yield f"{which}: {variant_label(study, best)}, {_multiples(scores.index, [f'{score:.2f}' for score in scores])}."


def _lowest(study: Study, table: pd.DataFrame) -> Iterator[str]:
    """Yield the variants with the fewest and the most bits per byte at each length."""
    for multiple, group in table.groupby("multiple"):
        means = group.groupby("variant")["value"].mean().sort_values(kind="stable")
        yield f"Fewest bits per byte at {multiple:g}x: {variant_label(study, means.index[0])}, {means.iloc[0]:.2f}."
        if len(means) > 1:
            yield f"Most: {variant_label(study, means.index[-1])}, {means.iloc[-1]:.2f}."


def _names(study: Study, variants: Iterable[str]) -> str:
    return "; ".join(variant_label(study, variant) for variant in variants)


def _share(solved: pd.Series, count: pd.Series) -> str:
    return _multiples(solved.index, [f"{s} of {n}" for s, n in zip(solved, count, strict=True)])


def _multiples(multiples: Iterable[float], values: Iterable[str] = ()) -> str:
    """`1x and 8x`, each with its value if there are values."""
    lengths = [f"{multiple:g}x" for multiple in multiples]
    parts = [f"{value} at {length}" for value, length in zip(values, lengths, strict=True)] if (values := [*values]) else lengths
    return " and ".join(parts)
