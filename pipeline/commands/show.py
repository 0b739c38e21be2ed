"""Print the verdicts and the results in the terminal."""

from __future__ import annotations

import pandas as pd
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipeline.config.grid import seeds_of, variants_on
from pipeline.config.study import Study
from pipeline.reporting.labels import task_label, variant_label, with_slug
from pipeline.reporting.verdicts import claims_about, left_out, of_the_study, read_verdicts, verdict_table
from pipeline.storage.results import primary, read_results
from pipeline.storage.tables import PRIMARY

WIDE = 120
"""Characters. On a narrower terminal, the numbers need the room of the names."""
COLOURS = {"supported": "green", "contradicted": "red", "undecided": "yellow"}


def show(study: Study, task: str | None, console: Console | None = None) -> None:
    """Print a table per task and the verdicts; with `task`, only that table and the claims about it.

    Raises ValueError if results or verdicts are missing.
    """
    console = console or Console()
    scores = primary(study, read_results(study))
    all_verdicts = read_verdicts()
    if task:
        all_verdicts = all_verdicts[all_verdicts["claim"].isin(claims_about(task))]
    verdicts = of_the_study(all_verdicts)
    for name in [task] if task else study.tasks:
        console.print(_scores(study, name, scores[scores["task"] == name], names=console.width >= WIDE))
    if len(verdicts):
        console.print(_claims(verdicts))
    if note := left_out(all_verdicts):
        console.print(note, highlight=False)


def _claims(verdicts: pd.DataFrame) -> Table:
    table = Table(title="claims", title_justify="left", show_lines=True)
    shown = verdict_table(verdicts)
    for column in shown.columns:
        table.add_column(column, overflow="fold", ratio=2 if column in ("claim", "decided by") else None)
    for verdict, row in zip(verdicts["verdict"], shown.itertuples(index=False), strict=True):
        claim, _, *rest = map(escape, row)
        table.add_row(claim, f"[{COLOURS[verdict]}]{verdict}[/]", *rest)
    return table


def _scores(study: Study, task: str, scores: pd.DataFrame, *, names: bool) -> Table:
    """One row per variant, best first at the longest length of `evaluate.multiples`."""
    section = study.tasks[task]
    multiples = [m for m in section.data.multiples if m in set(scores["multiple"])]
    cells = scores.groupby(["variant", "multiple"])["value"].agg(_mean_and_range)
    last = max((m for m in study.evaluate.multiples if m in multiples), default=multiples[-1])
    means = scores[scores["multiple"] == last].groupby("variant")["value"].mean()
    order = means.sort_values(ascending=section.data.goal != "accuracy").index
    metric = PRIMARY[section.data.goal].replace("_", " ")
    title = (
        f"{with_slug(task_label(study, task), task)}: {metric} over {_seed_count(study, task)} seeds, by multiple of the training"
        " length"
    )
    table = Table(title=title, title_justify="left", collapse_padding=True)
    table.add_column("variant", no_wrap=True)  # a wrapped name cannot be copied
    for multiple in multiples:
        table.add_column(f"{multiple:g}x", justify="right", overflow="fold")
    if names:
        table.add_column("name")
    for variant in [*order, *(v for v in variants_on(study, task) if v not in order)]:
        values = [cells.get((variant, multiple), "-") for multiple in multiples]
        table.add_row(variant, *values, *([variant_label(study, variant)] if names else []))
    return table


def _seed_count(study: Study, task: str) -> str:
    counts = sorted({len(seeds_of(study, task, variant)) for variant in variants_on(study, task)})
    return f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else f"{counts[0]}"


def _mean_and_range(values: pd.Series) -> str:
    """Format the mean, the range if the seeds differ, and the number of diverged seeds."""
    lines, diverged = [], values.isna().sum()
    if diverged < len(values):
        mean, low, high = (f"{value:.3f}" for value in (values.mean(), values.min(), values.max()))
        lines = [mean] if low == high else [mean, f"[dim]{low} to {high}[/]"]
    return "\n".join([*lines, f"{diverged} diverged"] if diverged else lines)
