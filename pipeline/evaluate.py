"""results/<task>.csv: every metric of every variant, seed and length, one long tidy table; filters/<task>.csv: the filters.

scores/<task>.npz has what the metric of the task is a mean of, sequence by sequence, for intervals.
"""

from __future__ import annotations

import functools
import math
import shutil
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from cat.diagnostics import attention_statistics, filter_taps
from cat.evaluation import Scores, Tally, tally
from cat.model import SequenceModel
from pipeline import compute, runs
from pipeline.files import CHECKPOINTS, FILTERS, RESULTS, SCORES, Meta, read_meta, read_split, read_task, whole, write_csv

COLUMNS = ("task", "variant", "seed", "length", "metric", "value")
FILTER_COLUMNS = ("task", "variant", "seed", "layer", "stream", "row", "tap", "value")


Rows = list[dict[str, Any]]
Sequences = dict[str, NDArray[np.float32]]
"""`variant/seed/length` -> two rows with a column a sequence: answers right, or bits on text; and answers asked."""


class Job(NamedTuple):
    """One trained model."""

    variant: str
    seed: int


def evaluate(
    task: str, variants: list[str], seeds: tuple[int, ...], precision: str, *, device: str, threads: int | Literal["auto"]
) -> None:
    """Scores every variant and seed at every length that it can read; at the training length, looks at attention and filters.

    A seed that diverged has empty values.
    """
    meta, where = read_meta(task), compute.resolve_device(device)
    jobs = [Job(variant, seed) for variant in variants for seed in seeds]
    with tqdm(total=len(jobs), desc=f"evaluate {task}", unit="model", disable=None) as bar:

        def advance(done: int) -> None:
            bar.update(done)

        work = functools.partial(_rows, task, meta, precision)
        tables = compute.spread(work, jobs, device=where, threads=threads, report=advance)
    with whole(RESULTS / f"{task}.csv") as path:
        write_csv(path, (row for scored, _, _ in tables for row in scored), COLUMNS)
    with whole(FILTERS / f"{task}.csv") as path:
        write_csv(path, (row for _, filters, _ in tables for row in filters), FILTER_COLUMNS)
    with whole(SCORES / f"{task}.npz") as path, path.open("wb") as file:
        arrays = {key: columns for *_, sequences in tables for key, columns in sequences.items()}
        np.savez_compressed(file, allow_pickle=False, **arrays)
    shutil.rmtree(CHECKPOINTS / task, ignore_errors=True)


def metrics(scores: Scores, goal: str, *, autoregressive: bool) -> dict[str, float]:
    """The metrics of a task by name. Under autoregression the loss would mix two inputs, so it is left out."""
    if goal == "loss":
        return {"loss": scores.loss, "perplexity": scores.perplexity, "bits_per_byte": scores.bits, "accuracy": scores.accuracy}
    shares = {"accuracy": scores.accuracy, "sequence_accuracy": scores.sequence_accuracy}
    return shares if autoregressive else {**shares, "loss": scores.loss}


def _rows(
    task: str, meta: Meta, precision: str, job: Job, device: torch.device, report: compute.Report
) -> tuple[Rows, Rows, Sequences]:
    path = runs.weights_path(task, job.variant, job.seed)
    model = runs.load_model(path).to(device) if path.exists() else None
    longest = runs.longest(task, job.variant)
    rows: Rows = []
    sequences: Sequences = {}
    if model is not None:
        rows += _tidy({"task": task, **job._asdict(), "length": meta.length}, _attention(task, meta, model, device))
    for length in meta.lengths:
        if longest is not None and length > longest:
            continue
        if model is None:
            values = dict.fromkeys(metrics(Scores(0, 0, 0), meta.goal, autoregressive=meta.autoregressive), math.nan)
        else:
            split = runs.split(task, f"test_{length}", device)
            answered = tally(model, split, precision=precision, autoregressive=meta.autoregressive)
            sequences[f"{job.variant}/{job.seed}/{length}"] = _sequences(answered, meta.goal)
            values = metrics(Scores.of(answered), meta.goal, autoregressive=meta.autoregressive)
        rows += _tidy({"task": task, **job._asdict(), "length": length}, values.items())
    report(1)
    return rows, [] if model is None else _filters({"task": task, **job._asdict()}, model), sequences


def _sequences(answered: Tally, goal: str) -> NDArray[np.float32]:
    amount = answered.right if goal == "accuracy" else answered.loss / math.log(2)
    return torch.stack([amount, answered.asked]).numpy().astype(np.float32)


def _attention(task: str, meta: Meta, model: SequenceModel, device: torch.device) -> Iterator[tuple[str, float]]:
    """What every layer attends to at the training length, by name of the metric."""
    examples = read_split(task, f"test_{meta.length}")
    sources = read_task(task).sources(examples)
    inputs, asked = torch.tensor(examples.inputs, device=device).long(), torch.tensor(examples.targets >= 0, device=device)
    where = None if sources is None else torch.tensor(sources, device=device)
    for layer, statistics in enumerate(attention_statistics(model, inputs, asked, where), 1):
        if statistics is not None:
            yield f"attention_entropy_{layer}", statistics.entropy
            if statistics.on_answer is not None:
                yield f"attention_on_answer_{layer}", statistics.on_answer


def _filters(key: dict[str, Any], model: SequenceModel) -> Rows:
    return [
        {**key, "layer": layer, "stream": stream, "row": row, "tap": tap, "value": f"{value:.6g}"}
        for layer, stream, row, taps in filter_taps(model)
        for tap, value in enumerate(taps)
    ]


def _tidy(key: dict[str, Any], values: Iterable[tuple[str, float]]) -> Rows:
    return [{**key, "metric": metric, "value": value} for metric, value in values]
