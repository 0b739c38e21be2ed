"""reports/report.md and report.html: for every question its verdicts, figures, table, what fails, and what was run.

When and by which commit a cell was trained is part of it, so that no two are alike and it is no output of a stage for DVC.
"""

from __future__ import annotations

import datetime
import hashlib
import math
from collections.abc import Iterable
from pathlib import Path

import pandas as pd
from ruamel.yaml import YAML

from cat.mixers.registry import ConstructionConfig
from pipeline.config.grid import Cell, cells, shown_cells, shown_tasks, shown_variants, variants_on
from pipeline.config.study import Ablation, Study
from pipeline.figures.cost import cost
from pipeline.figures.plots import figures_of
from pipeline.figures.positions import positions_table
from pipeline.figures.recall import gains_table
from pipeline.figures.stability import stability
from pipeline.figures.style import begin, save
from pipeline.reporting.html import page
from pipeline.reporting.tables import found, results_table, verdicts_in_words
from pipeline.reporting.verdicts import of_the_study, read_verdicts, verdict_table
from pipeline.storage import runs
from pipeline.storage.files import atomic_write
from pipeline.storage.paths import REPORTS
from pipeline.storage.results import primary, read_results
from pipeline.storage.tables import DIAGNOSIS_COLUMNS, read_table
from pipeline.storage.training_log import read_log

MARKDOWN, PAGE = REPORTS / "report.md", REPORTS / "report.html"


def report(study: Study) -> None:
    """Writes both. Raises ValueError where a result is missing."""
    results = read_results(study)
    scores = primary(study, results)
    verdicts, diagnosis = read_verdicts(), read_table(REPORTS / "diagnosis.csv", DIAGNOSIS_COLUMNS)
    parts = ["# What the study shows", '<a id="claims"></a>', verdicts_in_words(), _study(study)]
    for name, ablation in study.ablations.items():
        if not (shown_tasks(study, ablation) and shown_variants(ablation)):
            continue
        parts += [f'<a id="{name}"></a>', f"## {ablation.question}", _verdicts(verdicts, name), _figures(name, ablation)]
        if not ablation.shows_models:
            parts.append(results_table(study, scores, ablation))
            if ablation.plot == "learning_rates":
                parts.append(found(study, ablation).to_markdown(index=False))
            if ablation.plot == "stability":
                runs_of_it = stability(study, ablation)
                parts.append(_folded("Every run, with the entropy of each head, layers apart by semicolons", runs_of_it))
            parts.append(_failures(study, ablation, diagnosis))
        if ablation.plot == "positions":
            parts.append(_table(positions_table(study, ablation)))
        if ablation.plot == "recall":
            parts.append(_table(gains_table(study, ablation, results)))
        parts.append(_what_was_run(study, ablation))
    costs = costs_of(study, scores)
    if len(costs):  # a study of theorems alone has none
        begin(study)
        with atomic_write(REPORTS / "cost.png") as png, atomic_write(REPORTS / "cost.svg") as svg:
            save(cost(study, costs), png, svg)
        parts += [
            '<a id="cost"></a>',
            "## What does it cost?",
            "![accuracy by cost](cost.png)",
            _COST,
            _folded("The numbers", costs),
        ]
    text = "\n\n".join(filter(None, parts)) + "\n"
    with atomic_write(MARKDOWN) as markdown, atomic_write(PAGE) as html:
        markdown.write_text(text, encoding="utf-8")
        html.write_text(page(text, REPORTS), encoding="utf-8")


_COST = (
    "Every variant at the longest length of the tables, against its parameters and the seconds that a run of it took: its steps,"
    " its looks at the validation split, and the end that a solved task puts to it. Other runs were under way beside it, so"
    " these are no benchmark (benchmarks/ has one). The line joins the variants that are better than all that cost less."
)


def _folded(title: str, table: pd.DataFrame) -> str:
    text = table.to_markdown(index=False, floatfmt=(".3f",) * len(table.columns), intfmt=",")
    return f"<details><summary>{title}</summary>\n\n{text}\n\n</details>"


def _table(table: pd.DataFrame) -> str:
    """A dash where there is nothing to be had."""
    return table.astype(object).where(table.notna(), None).to_markdown(index=False, floatfmt=".3f", missingval="-")


def _study(study: Study) -> str:
    text = Path("params.yaml").read_bytes()
    preset = next((str(path) for path in sorted(Path("presets").glob("*.yaml")) if _same(path, text)), None)
    which = f"It is that of {preset}" if preset else "It is that of no preset"
    return (
        f"Of params.yaml (sha256 {hashlib.sha256(text).hexdigest()[:16]}). {which}; {len(cells(study))} cells, seeds"
        f" {', '.join(map(str, study.seeds))}, {study.precision}. {_trained(cells(study))} [What it costs](#cost)."
    )


def _same(preset: Path, text: bytes) -> bool:
    yaml = YAML(typ="safe")
    return bool(yaml.load(preset.read_bytes()) == yaml.load(text))


def _verdicts(verdicts: pd.DataFrame, ablation: str) -> str:
    here = of_the_study(verdicts[verdicts["ablation"] == ablation])
    return verdict_table(here).to_markdown(index=False, disable_numparse=True) if len(here) else ""


def _figures(name: str, ablation: Ablation) -> str:
    return "\n\n".join(f"![{file.replace('_', ' ')}](figures/{file}.png)" for file in figures_of(name, ablation))


def _failures(study: Study, ablation: Ablation, diagnosis: pd.DataFrame) -> str:
    """What is wrong with which variant, and which are without a sign of failure."""
    shown = shown_cells(study, ablation)
    here = diagnosis.set_index(["task", "variant"])
    here = here[here.index.isin(shown)]
    sound = [(task, variant) for task, variant in shown if (task, variant) not in here.index]
    lines = [f"on {task}: {', '.join(v for t, v in sound if t == task)}" for task in dict.fromkeys(t for t, _ in sound)]
    without = f"Without a sign of failure: {'; '.join(lines)}." if lines else "No variant is without a sign of failure."
    if not len(here):
        return without
    return f"{without}\n\n{_folded(f'What fails, and how: {len(here)} signs', here.reset_index())}"


def _what_was_run(study: Study, ablation: Ablation) -> str:
    tasks, variants = shown_tasks(study, ablation), shown_variants(ablation)
    shown = [cell for cell in cells(study) if cell.task in tasks and cell.variant in variants]
    own = [cell for cell in shown if cell.task in ablation.tasks and cell.variant in ablation.variants]
    others = f", {len(shown) - len(own)} of them for another question" if len(own) < len(shown) else ""
    sources = ", ".join(f"[results/{task}.csv](../results/{task}.csv)" for task in tasks)
    if ablation.plot in ("filters", "positions"):
        files = [f"results/{ablation.plot}/{task}.csv" for task in tasks]
        sources = ", ".join(f"[{file}](../{file})" for file in files)
    rows = {
        "filters": "the rows of these variants",
        "stability": "the rows of these variants, in nats, for every learning rate",
        "positions": "the rows of these variants",
        "recall": "the rows of these variants whose metric is recalled_share or begins with loss",
        "example": "the first test sequence of the training length, read by the weights in runs/",
    }.get(ablation.plot, "the rows of these variants whose metric is accuracy, or bits_per_byte on text; curves: every length")
    if ablation.plot == "stability":
        sources = "[reports/stability.csv](stability.csv)"
    numbers = f"Numbers: {rows}." if ablation.plot == "example" else f"Numbers: {sources}, {rows}."
    seeds = ", ".join(map(str, study.seeds))
    return f"*What was run*: {len(shown)} cells{others}, with seeds {seeds}. {_trained(shown)} {numbers}"


def _trained(shown: Iterable[Cell]) -> str:
    """On what, when and by which commit; of cells that another machine or an earlier run trained, that they were."""
    shown = list(shown)
    devices = sorted({runs.read_summary(cell.task, cell.variant)["device"] for cell in shown})
    logs = [log for cell in shown if (log := read_log(cell.task, cell.variant)) is not None]
    where = f"Trained on {', '.join(devices)}"
    if not logs:
        return f"{where}; not here, but restored from a cache."
    commits = sorted(
        {f"`{log['commit'][:10]}`" + (" with uncommitted changes" if log["dirty"] else "") for log in logs if log["commit"]}
    )
    days = sorted({f"{datetime.datetime.fromtimestamp(log['started'], datetime.UTC):%Y-%m-%d}" for log in logs})
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    by = f", by commit {', '.join(commits)}" if commits else ""
    rest = f"; {len(shown) - len(logs)} restored from a cache" if len(logs) < len(shown) else ""
    return f"{where}, {when}{by}, in {sum(log['seconds'] for log in logs):,.0f} seconds, runs one after the other{rest}."


def costs_of(study: Study, scores: pd.DataFrame) -> pd.DataFrame:
    """By task and variant: parameters, seconds a run where timed here, and the metric at the longest length of the tables."""
    longest = scores[scores["multiple"] == max(study.evaluate.multiples)]
    values = longest.groupby(["task", "variant"])["value"].mean()
    rows = []
    for task in study.tasks:
        for variant in variants_on(study, task):
            if isinstance(study.variants[variant], ConstructionConfig):
                continue
            summary, log = runs.read_summary(task, variant), read_log(task, variant)
            rows.append(
                {
                    "task": task,
                    "variant": variant,
                    "parameters": summary["parameters"],
                    "seconds a run": log["seconds"] / len(summary["runs"]) if log else math.nan,
                    "value": values.get((task, variant), math.nan),
                }
            )
    return pd.DataFrame(rows, columns=["task", "variant", "parameters", "seconds a run", "value"])
