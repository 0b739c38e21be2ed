"""Write reports/report.md and report.html: per ablation its verdicts, figures, tables, failures, and what was run.

report.md depends only on the results. report.html also has training times, dates and commits, so it changes with every run and
is not in git.
"""

from __future__ import annotations

import datetime
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from pipeline.config.errors import ParamsError
from pipeline.config.grid import Cell, cells, seeds_text, shown_cells, shown_tasks, shown_variants
from pipeline.config.outputs import CLAIMS, COST, COST_BY_PARAMETERS, COST_BY_TIME, GLOSSARY, figure_plots
from pipeline.config.plots import load_plot
from pipeline.config.study import Ablation, Study
from pipeline.config.yaml_file import read_yaml
from pipeline.figures.drawing.cost import SECONDS, STATE, cost, cost_table, seconds_per_step
from pipeline.figures.drawing.style import save, set_theme
from pipeline.reporting.findings import findings
from pipeline.reporting.glossary import glossary
from pipeline.reporting.html import page
from pipeline.reporting.labels import task_label, variant_label, with_names, with_slug
from pipeline.reporting.markdown import escape
from pipeline.reporting.tables import claims_section, folded, references_table, results_table, with_labels
from pipeline.reporting.verdicts import markdown_table, of_the_study, read_verdicts
from pipeline.storage import runs
from pipeline.storage.files import atomic_write
from pipeline.storage.paths import REPORTS
from pipeline.storage.results import primary, read_references, read_results
from pipeline.storage.tables import DIAGNOSIS_COLUMNS, read_table
from pipeline.storage.task_data import overlap_line
from pipeline.storage.training_log import read_log, write_table

MARKDOWN, PAGE = REPORTS / "report.md", REPORTS / "report.html"


def report(study: Study) -> None:
    """Write both files, and the table of trainings. Raises ValueError if a result is missing."""
    results = read_results(study)
    write_table(cells(study))
    costs = timed_costs(study, primary(study, results))
    if costs[SECONDS].notna().any():
        set_theme()
        with atomic_write(REPORTS / f"{COST_BY_TIME}.svg") as svg:
            save(cost(study, costs, SECONDS), svg)
    with atomic_write(MARKDOWN) as markdown, atomic_write(PAGE) as html:
        markdown.write_text(_report(study, results, costs, timed=False), encoding="utf-8")
        html.write_text(page(_report(study, results, costs, timed=True), REPORTS), encoding="utf-8")


def _report(study: Study, results: pd.DataFrame, costs: pd.DataFrame, *, timed: bool) -> str:
    """The report as Markdown; with training times, dates and commits if `timed`."""
    scores, references, verdicts = primary(study, results), read_references(study), read_verdicts()
    diagnosis = read_table(REPORTS / "diagnosis.csv", DIAGNOSIS_COLUMNS)
    shown = {name: a for name, a in study.ablations.items() if shown_tasks(study, a) and shown_variants(a)}
    headings = {name: ablation.question for name, ablation in shown.items()} | ({COST: _COST_QUESTION} if len(costs) else {})
    contents = claims_section(headings | {GLOSSARY: "What are the tasks and variants?"})
    parts = [f"# {escape(study.title or 'Results of the study')}", _study(study, timed)]
    parts += [_anchor(CLAIMS), "## Questions and claims", contents]
    for name, ablation in shown.items():
        plot = load_plot(ablation.plot)
        scored = not plot.shows_models
        parts += [_anchor(name), f"## {escape(ablation.question)}", findings(study, scores, ablation) if scored else ""]
        parts += [f"What this does not show: {escape(ablation.limits)}" if ablation.limits else ""]
        parts += [_verdicts(study, verdicts, name), _figures(name, ablation)]
        parts += [results_table(study, scores, ablation), references_table(study, references, ablation)] if scored else []
        parts += plot.tables(study, ablation, results)
        parts += plot.timed_tables(study, ablation) if timed else []
        parts += [_failures(study, ablation, diagnosis)] if scored else []
        parts.append(_what_was_run(study, ablation, timed))
    if len(costs):  # a study with only constructions has no costs
        parts += [_anchor(COST), f"## {_COST_QUESTION}", _verdicts(study, verdicts, COST)]
        parts += [_figure("score by state size", f"figures/{COST}.svg", _COST)]
        parts += [_figure("score by parameters", f"figures/{COST_BY_PARAMETERS}.svg", _COST_BY_PARAMETERS)]
        if timed and costs[SECONDS].notna().any():
            parts += [_figure("score by time per step", f"{COST_BY_TIME}.svg", _COST_BY_TIME)]
        parts.append(folded("The numbers", with_labels(study, costs if timed else costs.drop(columns=SECONDS))))
    parts += [_anchor(GLOSSARY), "## Tasks and variants", glossary(study)]
    return "\n\n".join(filter(None, parts)) + "\n"


_COST_QUESTION = "What does it cost?"
_COST = (
    "Score at the longest length of the tables, by state size: how many numbers a model keeps after that many tokens to generate"
    " the next one. Look for marks at the top left: a high score with a small state. The line joins the variants that are better"
    " than all cheaper ones. Variants of a family at nearly the same place share a mark."
)
_COST_BY_PARAMETERS = "The same scores by parameters, without those of the embeddings and the head."
_COST_BY_TIME = (
    "The same scores by time per training step, with validation. Other runs were active at the same time, so this is no"
    " benchmark; benchmarks/ has one."
)


def _figure(title: str, source: str, caption: str) -> str:
    return f"![{title}]({source})\n\n*{caption}*"


def _study(study: Study, timed: bool) -> str:
    file = Path("params.yaml")
    preset = next((escape(str(path)) for path in sorted(Path("presets").glob("*.yaml")) if _same(path, file)), None)
    overlaps = "".join(f" {task_label(study, task)}: {line}." for task in study.tasks if (line := overlap_line(task)))
    return (
        f"params.yaml (sha256 {hashlib.sha256(file.read_bytes()).hexdigest()[:16]}) matches {preset or 'no preset'}."
        f" {len(cells(study))} cells, seeds {seeds_text(study)}, {study.precision}."
        f" {_trained(cells(study), timed)} [What does it cost?](#cost){overlaps}"
    )


def _same(preset: Path, file: Path) -> bool:
    """Whether both files have the same content; a preset that cannot be read is another one."""
    try:
        return bool(read_yaml(preset) == read_yaml(file))
    except ParamsError:
        return False


def _anchor(name: str) -> str:
    return f'<a id="{name}"></a>'


def _verdicts(study: Study, verdicts: pd.DataFrame, section: str) -> str:
    shown = of_the_study(verdicts[verdicts["ablation"] == section])
    if not len(shown):
        return ""
    named = shown.assign(reason=[with_names(study, reason) for reason in shown["reason"]])
    return markdown_table(named).to_markdown(index=False, disable_numparse=True)


def _figures(name: str, ablation: Ablation) -> str:
    figures = figure_plots(name, ablation).items()
    return "\n\n".join(_figure(file.replace("_", " "), f"figures/{file}.svg", plot.caption) for file, plot in figures)


def _failures(study: Study, ablation: Ablation, diagnosis: pd.DataFrame) -> str:
    """The failures of each variant, and the variants without one."""
    shown = shown_cells(study, ablation)
    by_cell = diagnosis.set_index(["task", "variant"])
    by_cell = by_cell[by_cell.index.isin(shown)]
    sound: dict[str, list[str]] = {}
    for task, variant in shown:
        if (task, variant) not in by_cell.index:
            sound.setdefault(task, []).append(variant_label(study, variant))
    lines = [f"* {with_slug(task_label(study, task), task)}: {'; '.join(variants)}" for task, variants in sound.items()]
    without = "\n".join(["No failure found:\n", *lines]) if lines else "Every variant has a failure."
    if not len(by_cell):
        return without
    failures = with_labels(study, by_cell.reset_index()).rename(columns={"failure_mode": "failure"})
    return f"{without}\n\n{folded(f'{len(failures)} failures', failures)}"


def _what_was_run(study: Study, ablation: Ablation, timed: bool) -> str:
    tasks, variants = shown_tasks(study, ablation), shown_variants(ablation)
    shown = [cell for cell in cells(study) if cell.task in tasks and cell.variant in variants]
    own = [cell for cell in shown if cell.task in ablation.tasks and cell.variant in ablation.variants]
    others = f" ({len(shown) - len(own)} trained for another ablation)" if len(own) < len(shown) else ""
    plot = load_plot(ablation.plot)
    sources = [f"[{file}]({os.path.relpath(file, REPORTS)})" for file in plot.sources(study, ablation)]
    numbers = f"Numbers: {', '.join([*sources, plot.rows])}."
    seeds = seeds_text(study, shown)
    return f"*What was run*: {len(shown)} cells{others}, seeds {seeds}. {_trained(shown, timed)} {numbers}"


def _trained(shown: Iterable[Cell], timed: bool) -> str:
    """The devices that trained the cells; if `timed` also dates, commits and training time, where this folder has the log."""
    shown = list(shown)
    devices = sorted({runs.read_summary(cell.task, cell.variant)["device"] for cell in shown})
    trained_on = f"Trained on {', '.join(devices)}"
    if not timed:
        return f"{trained_on}."
    logs = [log for cell in shown if (log := read_log(cell.task, cell.variant)) is not None]
    if not logs:
        return f"{trained_on}; restored from a cache, so without dates and times."
    commits = sorted(
        {f"`{log['commit'][:10]}`" + (" with uncommitted changes" if log["dirty"] else "") for log in logs if log["commit"]}
    )
    days = sorted({f"{datetime.datetime.fromtimestamp(log['started'], datetime.UTC):%Y-%m-%d}" for log in logs})
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    by = f", commit {', '.join(commits)}" if commits else ""
    restored = f"; restored from a cache: {len(shown) - len(logs)}" if len(logs) < len(shown) else ""
    return f"{trained_on}, {when}{by}, {sum(log['seconds'] for log in logs):,.0f} seconds of training in all{restored}."


def timed_costs(study: Study, scores: pd.DataFrame) -> pd.DataFrame:
    """`cost_table` with the seconds per training step; nan for cells that were restored from a cache."""
    costs = cost_table(study, scores)
    seconds = [seconds_per_step(task, variant) for task, variant in zip(costs["task"], costs["variant"], strict=True)]
    costs.insert(4, SECONDS, pd.Series(seconds, dtype=float))
    costs[STATE] = costs[STATE].astype("Int64")  # a whole number, or missing
    return costs
