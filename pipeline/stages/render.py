"""Write figures, tables and metrics to reports/, all of them aggregations of the results tables.

The outputs depend only on the results: the same results give the same bytes. pipeline/stages/report.py writes the report.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pandas as pd

from pipeline.config.grid import shown_tasks, shown_variants
from pipeline.config.outputs import COST, COST_BY_PARAMETERS, figure_plots
from pipeline.config.plots import load_plot
from pipeline.config.study import Study
from pipeline.figures.drawing.cost import PARAMETERS, STATE, cost, cost_table
from pipeline.figures.drawing.style import Picture, draw_all
from pipeline.figures.stability import full_stability_table
from pipeline.reporting.diagnosis import diagnose
from pipeline.reporting.labels import task_label, variant_label, with_slug
from pipeline.reporting.tables import headline
from pipeline.storage.files import atomic_write, write_json
from pipeline.storage.paths import REPORTS
from pipeline.storage.results import orphans, primary, read_references, read_results

README_MARKS = ("<!-- results: written by `python -m pipeline update-readme` -->", "<!-- end of results -->")


def render(study: Study) -> None:
    """Write all of reports/ but the report. Raises ValueError if a cell of the grid has no results."""
    results = read_results(study)
    scores = primary(study, results)
    with ExitStack() as parts:
        figures, metrics = (parts.enter_context(atomic_write(REPORTS / name)) for name in ("figures", "metrics"))
        for folder in (figures, metrics):
            folder.mkdir()
        draw_all(study, list(_pictures(study, results, figures)))
        for variant, values in _metrics(study, scores).items():
            write_json(metrics / f"{variant}.json", values)
        tables = {
            "lengths": _curves(study, scores),
            "diagnosis": diagnose(study, results, read_references(study)),
            "stability": full_stability_table(study),
        }
        for name, table in tables.items():
            table.to_csv(parts.enter_context(atomic_write(REPORTS / f"{name}.csv")), index=False, lineterminator="\n")
        parts.enter_context(atomic_write(REPORTS / "headline.md")).write_text(headline() + "\n", encoding="utf-8")
    if paths := list(map(str, orphans(study))):
        print(f"ignored what is no longer part of the study. Fix: `rm -r {' '.join(paths)}`")


def _pictures(study: Study, results: pd.DataFrame, folder: Path) -> Iterator[Picture]:
    """The figures of the study. Those that show models come first: they take longest to draw."""
    references = primary(study, read_references(study))
    for name, ablation in sorted(study.ablations.items(), key=lambda item: not load_plot(item[1].plot).shows_models):
        tasks, variants = shown_tasks(study, ablation), shown_variants(ablation)
        shown = results[results["task"].isin(tasks) & results["variant"].isin(variants)]
        levels = references[references["task"].isin(tasks) & references["reference"].isin(ablation.reference_lines)]
        for file, plot in figure_plots(name, ablation).items() if tasks and variants else ():
            table = shown if plot.uses_metrics else primary(study, shown)
            draw = partial(plot.draw, ablation=ablation, results=table, references=levels)
            yield Picture(draw, folder / f"{file}.svg")
    costs = cost_table(study, primary(study, results))
    if len(costs):  # a study with only constructions has no costs
        yield Picture(partial(cost, costs=costs, price=STATE), folder / f"{COST}.svg")
        yield Picture(partial(cost, costs=costs, price=PARAMETERS), folder / f"{COST_BY_PARAMETERS}.svg")


def _curves(study: Study, results: pd.DataFrame) -> pd.DataFrame:
    """Mean and range over seeds by task, variant and length, with names, for `dvc plots`."""
    keys = ["task", "variant", "length", "multiple", "metric"]
    grouped = results.groupby(keys, sort=False)["value"]
    table = grouped.agg(mean="mean", low="min", high="max", seeds="count").reset_index()
    table["task_name"] = [with_slug(task_label(study, task), task) for task in table["task"]]
    table["variant_name"] = [with_slug(variant_label(study, variant), variant) for variant in table["variant"]]
    return table


def _metrics(study: Study, results: pd.DataFrame) -> dict[str, dict[str, dict[str, float]]]:
    """Variant -> task -> metric at a length -> mean over seeds, for `dvc metrics`."""
    shown = results[results["multiple"].isin(study.evaluate.multiples)]
    means = shown.groupby(["variant", "task", "metric", "multiple"])["value"].mean().dropna()
    nested: dict[str, dict[str, dict[str, float]]] = {variant: {} for variant in study.variants}
    for (variant, task, metric, multiple), value in means.items():
        nested[variant].setdefault(task, {})[f"{metric}_{multiple:g}x"] = round(value, 6)
    return nested


def update_readme() -> None:
    """Copy reports/headline.md between the marks in README.md. Raises ValueError if a mark is missing."""
    path = Path("README.md")
    text = path.read_text(encoding="utf-8")
    first, last = README_MARKS
    if first not in text or last not in text:
        raise ValueError(f"README.md: the line {first if first not in text else last} is missing")
    before, after = text.split(first)[0], text.split(last)[1]
    copied = (REPORTS / "headline.md").read_text(encoding="utf-8").replace("](report.md#", "](reports/report.md#")
    with atomic_write(path.resolve()) as part:  # a link stays: the file is the user's
        part.write_text(f"{before}{first}\n\n{copied}\n{last}{after}", encoding="utf-8")
