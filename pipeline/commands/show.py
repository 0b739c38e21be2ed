"""The verdicts and the results in the terminal."""

from __future__ import annotations

import pandas as pd
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipeline.config.grid import variants_on
from pipeline.config.study import Study
from pipeline.reporting.verdicts import claims_about, left_out, of_the_study, read_verdicts, verdict_table
from pipeline.storage.results import PRIMARY, primary, read_results

COLOURS = {"supported": "green", "contradicted": "red", "undecided": "yellow"}


def show(study: Study, task: str | None, console: Console | None = None) -> None:
    """Prints a table a task, of `task` alone where it is given, and the verdicts that speak of it.

    Raises ValueError where results or verdicts are missing.
    """
    console = console or Console()
    scores = primary(study, read_results(study))
    every = read_verdicts()
    if task:
        every = every[every["claim"].isin(claims_about(task))]
    verdicts = of_the_study(every)
    for name in [task] if task else study.tasks:
        console.print(_scores(study, name, scores[scores["task"] == name]))
    if len(verdicts):
        console.print(_claims(verdicts))
    if others := left_out(every):
        console.print(others, highlight=False)


def _claims(verdicts: pd.DataFrame) -> Table:
    table = Table(title="claims", title_justify="left", show_lines=True)
    shown = verdict_table(verdicts)
    for column in shown.columns:
        table.add_column(column, overflow="fold", ratio=2 if column in ("claim", "decided by") else None)
    for verdict, row in zip(verdicts["verdict"], shown.itertuples(index=False), strict=True):
        claim, _, *rest = map(escape, row)
        table.add_row(claim, f"[{COLOURS[verdict]}]{verdict}[/]", *rest)
    return table


def _scores(study: Study, task: str, scores: pd.DataFrame) -> Table:
    """A row a variant, best first at the last length of the tables."""
    section = study.tasks[task]
    multiples = [m for m in section.data.multiples if m in set(scores["multiple"])]
    cells = scores.groupby(["variant", "multiple"])["value"].agg(_mean_and_range)
    last = max((m for m in study.evaluate.multiples if m in multiples), default=multiples[-1])
    means = scores[scores["multiple"] == last].groupby("variant")["value"].mean()
    order = means.sort_values(ascending=section.data.goal != "accuracy").index
    metric = PRIMARY[section.data.goal].replace("_", " ")
    table = Table(
        title=f"{task}: {metric} over {len(study.seeds)} seeds, by training lengths", title_justify="left", collapse_padding=True
    )
    table.add_column("variant", no_wrap=True)  # cut, they would be no names
    for multiple in multiples:
        table.add_column(f"{multiple:g}x", justify="right", overflow="fold")
    for variant in [*order, *(v for v in variants_on(study, task) if v not in order)]:
        table.add_row(variant, *(cells.get((variant, multiple), "-") for multiple in multiples))
    return table


def _mean_and_range(values: pd.Series) -> str:
    """The mean, below it where seeds differ in what is shown the lowest to the highest, and how many seeds diverged."""
    lines, lost = [], values.isna().sum()
    if lost < len(values):
        mean, low, high = (f"{value:.3f}" for value in (values.mean(), values.min(), values.max()))
        lines = [mean] if low == high else [mean, f"[dim]{low} to {high}[/]"]
    return "\n".join([*lines, f"{lost} diverged"] if lost else lines)
