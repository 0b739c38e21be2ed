"""The tables of the study, as text: results by variant, what training found, the verdicts, what was run."""

from __future__ import annotations

import pandas as pd

from pipeline.config.grid import shown_on, shown_tasks, shown_variants, variants_on
from pipeline.config.study import Ablation, Study
from pipeline.reporting.verdicts import left_out, of_the_study, read_verdicts, verdict_table
from pipeline.storage import runs
from pipeline.storage.results import PRIMARY

LABELS = {"accuracy": "accuracy", "bits_per_byte": "bits per byte"}


def results_table(study: Study, results: pd.DataFrame, ablation: Ablation) -> str:
    """Markdown: a row a variant with its parameters, a column a task and length with the mean over seeds and their range."""
    columns = {}
    for task in shown_tasks(study, ablation):
        for multiple in study.evaluate.multiples:
            here = results[(results["task"] == task) & (results["multiple"] == multiple)].groupby("variant")["value"]
            columns[f"{task} {multiple:g}x"] = here.apply(_mean_and_spread)
    frame = pd.DataFrame(columns).reindex(shown_variants(ablation)).fillna("-")
    frame.insert(0, "parameters", [_parameters(study, ablation, variant) for variant in frame.index])
    return frame.rename_axis("variant").to_markdown()


def _parameters(study: Study, ablation: Ablation, variant: str) -> str:
    """On the first task of the figure that it is trained on; vocabularies differ from task to task, and embeddings with them."""
    task = next(task for task in shown_tasks(study, ablation) if variant in variants_on(study, task))
    return f"{runs.read_summary(task, variant)['parameters']:,}"


def found(study: Study, ablation: Ablation) -> pd.DataFrame:
    """By task, variant and learning rate: the runs, those whose key filter solves every length, and the accuracy on validation.

    Only variants whose filter the condition is about (cat/evaluation/diagnostics.py); a run that diverged has found nothing.
    """
    rows = []
    for task in shown_tasks(study, ablation):
        for variant in shown_on(study, ablation, task):
            tried = pd.DataFrame(runs.read_summary(task, variant)["runs"])
            tried = tried[tried["seed"].isin(study.seeds)]
            if tried["solves_every_length"].notna().any():
                for rate, group in tried.groupby("learning_rate"):
                    rows.append(
                        {
                            "task": task,
                            "variant": variant,
                            "learning rate": rate,
                            "runs": len(group),
                            "found": int((group["solves_every_length"].eq(True) & group["stop"].ne("diverged")).sum()),
                            "validation accuracy": group["valid_accuracy"].mean(),
                        }
                    )
    return pd.DataFrame(rows, columns=["task", "variant", "learning rate", "runs", "found", "validation accuracy"])


def _mean_and_spread(values: pd.Series) -> str:
    """`mean (lowest to highest)`; a seed that diverged has no value and is counted."""
    left = values.dropna()
    lost = len(values) - len(left)
    text = f"{left.mean():.3f} ({left.min():.3f} to {left.max():.3f})" if len(left) else ""
    return f"{text} {lost} diverged".strip() if lost else text


def what_was_run(study: Study) -> str:
    devices = {runs.read_summary(task, variant)["device"] for task in study.tasks for variant in variants_on(study, task)}
    rates = {name: ", ".join(f"{rate:g}" for rate in section.training.learning_rates) for name, section in study.tasks.items()}
    multiples = " and ".join(f"{multiple:g}x" for multiple in study.evaluate.multiples)
    return (
        f"Mean over seeds {', '.join(map(str, study.seeds))} (lowest to highest) at {multiples} the training length; "
        + "; ".join(f"{name}: {LABELS[PRIMARY[section.data.goal]]}" for name, section in study.tasks.items())
        + f". Run on {', '.join(sorted(devices))} in {study.precision}; learning rates tried: "
        + "; ".join(f"{name} {rate}" for name, rate in rates.items())
        + ". A dash: not trained on that task, or positions that do not reach that length."
    )


def verdicts_in_short(report: str) -> str:
    """The claims of claims.yaml with their verdicts, as Markdown, linked to their figures in the file `report`."""
    every = read_verdicts()
    verdicts = of_the_study(every)
    if not len(verdicts):
        return left_out(every)
    rows = [(f"{row.statement} ({row.source})", f"[**{row.verdict}**]({report}#{row.ablation})") for row in verdicts.itertuples()]
    table = pd.DataFrame(rows, columns=["claim", "verdict"])
    told = f"{_counted(every)} [The report]({report}#claims) has the effect behind each, and how sure it is."
    return f"{table.to_markdown(index=False)}\n\n{told}"


def verdicts_in_words() -> str:
    """The claims of claims.yaml with their verdicts and what decided them, as Markdown, linked to their figures."""
    every = read_verdicts()
    verdicts = of_the_study(every)
    if not len(verdicts):
        return left_out(every)
    table = verdict_table(verdicts)
    table["ablation"] = [f"[{name}](#{name})" for name in verdicts["ablation"]]
    return (
        f"{table.to_markdown(index=False, disable_numparse=True)}\n\n{_counted(every)}"
        " An effect is the mean of the metric less that of the other side, in the comparison named under *decided by*; its"
        " interval is Student's, over seeds and test sequences, or over seeds alone where the metric is not the one that stands"
        " for its task. p is of the same test but of the whole claim: of its comparisons the largest for it, or the smallest"
        " against it times their number where it is contradicted, corrected for all claims; a dash where no seed and no sequence"
        " differs, and nothing is tested. claims.yaml says what decides a claim, verdicts/comparisons.csv has every comparison."
    )


def _counted(every: pd.DataFrame) -> str:
    """How many claims have which verdict, in a sentence or two."""
    verdicts = of_the_study(every)
    counts = verdicts["verdict"].value_counts()
    said = ", ".join(f"{counts.get(verdict, 0)} {verdict}" for verdict in ("supported", "contradicted", "undecided"))
    others = left_out(every)
    return f"{len(verdicts)} claim{'s' if len(verdicts) > 1 else ''}: {said}." + (f" {others}" if others else "")
