"""reports/: figures, tables and metrics, group-bys over the one results table, and what is wrong with which cell.

All that is written here is the same whenever the results are; the report around it, which is not, is pipeline/stages/report.py's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pandas as pd

from pipeline.config.grid import shown_tasks, shown_variants
from pipeline.config.study import Study
from pipeline.figures.attention import attention
from pipeline.figures.plots import figures_of
from pipeline.figures.recall import recall
from pipeline.figures.stability import every_run
from pipeline.figures.style import Picture, draw_all
from pipeline.reporting.diagnosis import diagnose
from pipeline.reporting.tables import results_table, verdicts_in_short, what_was_run
from pipeline.storage.files import atomic_write, write_json
from pipeline.storage.paths import REPORTS
from pipeline.storage.results import orphans, primary, read_results

README_MARKS = ("<!-- results: written by `python -m pipeline update-readme` -->", "<!-- end of results -->")


def render(study: Study) -> None:
    """Writes what is in reports/ anew. Raises ValueError where a cell of the grid has no results."""
    results = read_results(study)
    scores = primary(study, results)
    with ExitStack() as parts:
        figures, svg, metrics = (parts.enter_context(atomic_write(REPORTS / name)) for name in ("figures", "svg", "metrics"))
        for folder in (figures, svg, metrics):
            folder.mkdir()
        draw_all(study, list(_pictures(study, results, figures, svg)))
        for variant, values in _metrics(study, scores).items():
            write_json(metrics / f"{variant}.json", values)
        tables = {"lengths": _curves(study, scores), "diagnosis": diagnose(study, results), "stability": every_run(study)}
        for name, table in tables.items():
            table.to_csv(parts.enter_context(atomic_write(REPORTS / f"{name}.csv")), index=False, lineterminator="\n")
        parts.enter_context(atomic_write(REPORTS / "headline.md")).write_text(_headline(study, scores), encoding="utf-8")
    for stray in orphans(study):
        what = "is no cell" if stray.is_dir() else "is of no task"
        print(f"{stray}: {what} of the study any more and was left out; `rm -r {stray}` removes it")


def _pictures(study: Study, results: pd.DataFrame, figures: Path, svg: Path) -> Iterator[Picture]:
    """Those of the inside of models first, which take longest to draw."""
    for name, ablation in sorted(study.ablations.items(), key=lambda item: not item[1].shows_models):
        tasks, variants = shown_tasks(study, ablation), shown_variants(ablation)
        shown = results[results["task"].isin(tasks) & results["variant"].isin(variants)]
        for file, draw in figures_of(name, ablation).items() if tasks and variants else ():
            table = shown if draw in (attention, recall) else primary(study, shown)
            yield Picture(draw, ablation, table, figures / f"{file}.png", svg / f"{file}.svg")


def _headline(study: Study, scores: pd.DataFrame) -> str:
    """What README.md shows: the verdicts, and the results of the first ablation."""
    first = next((a for a in study.ablations.values() if a.tasks and a.variants), None)
    parts = [verdicts_in_short("report.md")]
    if first is not None:
        parts += [results_table(study, scores, first), what_was_run(study)]
    return "\n\n".join(filter(None, parts)) + "\n"


def _curves(study: Study, results: pd.DataFrame) -> pd.DataFrame:
    """Mean and spread by task, variant and length, for `dvc plots`."""
    keys = ["task", "variant", "length", "multiple", "metric"]
    grouped = results.groupby(keys, sort=False)["value"]
    return grouped.agg(mean="mean", low="min", high="max", seeds="count").reset_index()


def _metrics(study: Study, results: pd.DataFrame) -> dict[str, dict[str, dict[str, float]]]:
    """Variant -> task -> metric at a length -> mean over seeds, for `dvc metrics`: a row a variant, a column a task."""
    shown = results[results["multiple"].isin(study.evaluate.multiples)]
    means = shown.groupby(["variant", "task", "metric", "multiple"])["value"].mean().dropna()
    nested: dict[str, dict[str, dict[str, float]]] = {variant: {} for variant in study.variants}
    for (variant, task, metric, multiple), value in means.items():
        nested[variant].setdefault(task, {})[f"{metric}_{multiple:g}x"] = round(value, 6)
    return nested


def update_readme() -> None:
    """Replaces what stands between the marks in README.md by reports/headline.md, whose links are those of a file in reports/.

    Raises ValueError where a mark is missing.
    """
    path = Path("README.md")
    text = path.read_text(encoding="utf-8")
    first, last = README_MARKS
    if first not in text or last not in text:
        raise ValueError(f"README.md: lacks the line {first if first not in text else last}")
    before, after = text.split(first)[0], text.split(last)[1]
    headline = (REPORTS / "headline.md").read_text(encoding="utf-8").replace("](report.md#", "](reports/report.md#")
    with atomic_write(path) as part:
        part.write_text(f"{before}{first}\n\n{headline}\n{last}{after}", encoding="utf-8")
