"""Diagnose each cell: failure modes with the numbers that show them (reports/diagnosis.csv)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import pandas as pd

from pipeline.config.claims import SOLVED_AT
from pipeline.config.grid import seeds_of, variants_on
from pipeline.config.study import Study
from pipeline.storage import runs
from pipeline.storage.results import read_history
from pipeline.storage.tables import DIAGNOSIS_COLUMNS, PRIMARY

SOLVED = 0.95
"""Accuracy at the training length below which a task is not solved."""
HALF_SOLVED = 0.5
"""Accuracy at the training length below which a drop at longer lengths means nothing."""
DROP = 0.05
"""Loss of accuracy, or rise in bits, at a longer length that counts as a failure."""
SPREAD = 0.1
"""Difference between the best and the worst seed at the training length, in accuracy or bits, that counts as a failure."""
SPIKE = 0.5
"""Rise of the training loss above its lowest earlier value, in nats, that counts as a failure."""
AS_GOOD = 0.02
"""Difference of accuracy at the training length below which a model is as good as a partial strategy."""
UNFINISHED = 0.02
"""Gain on the validation split in the last fifth of the steps, in accuracy or nats, that counts as unfinished."""
ON_ANSWER = 0.5
"""Share of the attention on the answer's token from which the model attends to it."""


class Sign(NamedTuple):
    """One failure of a cell."""

    task: str
    variant: str
    failure_mode: str
    evidence: str


def diagnose(study: Study, results: pd.DataFrame, references: pd.DataFrame) -> pd.DataFrame:
    """One row per failure, in the order of the grid; `results` as from `read_results`, `references` as from `read_references`."""
    signs: list[Sign] = []
    for task in study.tasks:
        of_task = results[results["task"] == task]
        known = references[(references["task"] == task) & (references["multiple"] == 1)].set_index("reference")["value"]
        for variant in variants_on(study, task):
            found = _signs(study, task, variant, of_task[of_task["variant"] == variant], known)
            signs += [Sign(task, variant, *sign) for sign in found]
    return pd.DataFrame(signs, columns=[*DIAGNOSIS_COLUMNS])


def _signs(study: Study, task: str, variant: str, results: pd.DataFrame, references: pd.Series) -> Iterator[tuple[str, str]]:
    """The failures of a cell; `references` are the scores of the partial strategies at the training length."""
    goal = study.tasks[task].data.goal
    name = "accuracy" if goal == "accuracy" else "bits per byte"
    scores = results[results["metric"] == PRIMARY[goal]].dropna(subset="value")
    summary = runs.read_summary(task, variant)
    chosen = [
        r
        for r in summary["runs"]
        if r["learning_rate"] == summary["learning_rate"] and r["seed"] in seeds_of(study, task, variant)
    ]
    if diverged := [r for r in chosen if r["stop"] == "diverged"]:
        steps = ", ".join(str(r["steps"]) for r in diverged)
        yield "diverged", f"{len(diverged)} of {len(chosen)} seeds: non-finite loss at step {steps}"
    by_multiple = scores.groupby("multiple")["value"]
    if 1 not in by_multiple.groups:
        return
    means = by_multiple.mean()
    seeds = by_multiple.get_group(1)
    if goal == "accuracy" and means[1] < SOLVED:
        evidence = f"accuracy {means[1]:.3f} at the training length"
        evidence += _reference_evidence(study, task, means[1], references) + _attention_evidence(results)
        yield f"poor {study.tasks[task].data.kind.rpartition('.')[2]}", evidence
    if seeds.max() - seeds.min() > SPREAD:
        evidence = f"{name} from {seeds.min():.3f} to {seeds.max():.3f} at the training length"
        if goal == "accuracy":
            evidence += f"; {(seeds >= SOLVED_AT).sum()} of {len(chosen)} seeds solve it"
        yield "unstable over seeds", evidence
    worse = (means[1] - means) * (1 if goal == "accuracy" else -1)
    learned = goal == "loss" or means[1] >= HALF_SOLVED
    if learned and len(beyond := worse[(worse.index > 1) & (worse > DROP)]):
        last = means.index.max()
        more = "" if beyond.index[0] == last else f"; worse by more than {DROP:g} from {beyond.index[0]:g}x on"
        yield "limited length generalisation", f"{name} {means[1]:.3f} at 1x, {means[last]:.3f} at {last:g}x{more}"
    yield from _training_signs(study, task, variant, chosen, summary["learning_rate"])


def _reference_evidence(study: Study, task: str, accuracy: float, references: pd.Series) -> str:
    """The partial strategies that are as good as the cell, nearest first."""
    distance = (references - accuracy).abs().sort_values(kind="stable")
    labels = study.tasks[task].data.reference_labels
    near = [f"{labels[name]} ({references[name]:.3f})" for name in distance.index[distance < AS_GOOD]]
    return f"; as good as: {', or: '.join(near)}" if near else ""


def _attention_evidence(results: pd.DataFrame) -> str:
    """Mean attention over seeds on the answer's token, in the layer where it is largest."""
    by_layer = results[results["metric"].str.startswith("attention_on_answer")].groupby("metric")["value"].mean()
    if not len(by_layer):
        return ""
    share = by_layer.max()
    return f"; attention on the answer's token {share:.2f}: " + (
        "the model attends to other tokens" if share < ON_ANSWER else "the model attends to it but gives another output"
    )


def _training_signs(
    study: Study, task: str, variant: str, chosen: list[dict[str, Any]], rate: float
) -> Iterator[tuple[str, str]]:
    history = read_history(study, task, variant, rate)
    column, better = ("valid_accuracy", 1) if study.tasks[task].data.goal == "accuracy" else ("valid_loss", -1)
    gains = []
    spikes = []
    for run in chosen:
        curve = history[history["seed"] == run["seed"]].set_index("step")
        rise = curve["train_loss"] - curve["train_loss"].cummin()
        if rise.max() > SPIKE:
            spikes.append(f"seed {run['seed']} by {rise.max():.2f} nats at step {rise.idxmax()}")
        if run["stop"] == "steps" and len(late := curve[curve.index >= 0.8 * run["steps"]]) > 1:
            gains.append(better * (late[column].iloc[-1] - late[column].iloc[0]))
    if spikes:
        yield "loss spikes", "training loss rose: " + "; ".join(spikes)
    gain = sum(gains) / len(gains) if gains else -math.inf
    if gain > UNFINISHED:
        what = "accuracy" if column == "valid_accuracy" else "loss (nats)"
        yield "unfinished training", f"validation {what} still improved by {gain:.3f} in the last fifth of the steps"
