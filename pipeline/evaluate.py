"""results/<task>.csv: every metric of every variant, seed and length, one long tidy table."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import torch
from tqdm import tqdm

from cat.evaluation import Scores, Split, score
from pipeline import compute, runs
from pipeline.files import RESULTS, Meta, read_meta, read_split, whole, write_csv

COLUMNS = ("task", "variant", "seed", "length", "metric", "value")


class Job(NamedTuple):
    """One trained model."""

    variant: str
    seed: int


def evaluate(
    task: str, variants: list[str], seeds: tuple[int, ...], precision: str, *, device: str, threads: int | Literal["auto"]
) -> None:
    """Scores every variant and seed at every length that it can read. A seed that diverged has empty values."""
    meta, where = read_meta(task), compute.resolve_device(device)
    jobs = [Job(variant, seed) for variant in variants for seed in seeds]
    with tqdm(total=len(jobs), desc=f"evaluate {task}", unit="model", disable=None) as bar:

        def advance(done: int) -> None:
            bar.update(done)

        work = functools.partial(_rows, task, meta, precision, where)
        tables = compute.spread(work, jobs, device=where, threads=threads, report=advance)
    with whole(RESULTS / f"{task}.csv") as path:
        write_csv(path, (row for rows in tables for row in rows), COLUMNS)


def metrics(scores: Scores, goal: str, *, autoregressive: bool) -> dict[str, float]:
    """The metrics of a task by name. Under autoregression the loss would mix two inputs, so it is left out."""
    if goal == "loss":
        return {"loss": scores.loss, "perplexity": scores.perplexity, "bits_per_byte": scores.bits, "accuracy": scores.accuracy}
    shares = {"accuracy": scores.accuracy, "sequence_accuracy": scores.sequence_accuracy}
    return shares if autoregressive else {**shares, "loss": scores.loss}


def _rows(task: str, meta: Meta, precision: str, device: torch.device, job: Job, report: compute.Report) -> list[dict[str, Any]]:
    path = runs.weights_path(task, job.variant, job.seed)
    model = runs.load_model(path).to(device) if path.exists() else None
    longest = runs.longest(task, job.variant)
    rows: list[dict[str, Any]] = []
    for length in meta.lengths:
        if longest is not None and length > longest:
            continue
        if model is None:
            values = dict.fromkeys(metrics(Scores(0, 0, 0), meta.goal, autoregressive=meta.autoregressive), math.nan)
        else:
            split = Split(*(torch.tensor(array, device=device) for array in read_split(task, f"test_{length}")))
            scores = score(model, split, precision=precision, autoregressive=meta.autoregressive)
            values = metrics(scores, meta.goal, autoregressive=meta.autoregressive)
        rows += _tidy({"task": task, **job._asdict(), "length": length}, values.items())
    report(1)
    return rows


def _tidy(key: dict[str, Any], values: Iterable[tuple[str, float]]) -> list[dict[str, Any]]:
    return [{**key, "metric": metric, "value": value} for metric, value in values]
