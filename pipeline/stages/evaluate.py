"""Evaluate a task's trained models: results/<task>.csv has every metric per variant, seed and length, one row each.

Three folders in results/ and one beside it have more tables per task:

    results/filters/      the kernels
    results/references/   scores of partial strategies, which need no model
    results/rates/        the primary metric at every learning rate, for figures that show it
    scores/               scores per test sequence, for the intervals of the verdicts
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from cat.evaluation.by_part import accuracy_by_part
from cat.evaluation.by_recall import ByRecall, loss_by_recall
from cat.evaluation.diagnostics import attention_statistics, filter_kernels
from cat.evaluation.scores import Scores, SequenceTotals, token_scores
from cat.mixers.registry import mixer_module, read_model
from cat.model import SequenceModel
from cat.tasks.base import Extents, GeneratedData, Recalled
from cat.tasks.registry import Task, module_of
from pipeline.config.code_digest import code_digest
from pipeline.config.study import CellTraining
from pipeline.runtime import checkpoints, workers
from pipeline.runtime.devices import made_on, resolve_device
from pipeline.storage import runs
from pipeline.storage.files import atomic_write, sha256, write_csv
from pipeline.storage.paths import FILTERS, HELDOUT, RATES, REFERENCES, RESULTS, SCORES
from pipeline.storage.scored import ModelResults, Rows, prune_scored, read_scored, write_scored
from pipeline.storage.scores import SequenceScores, write_scores
from pipeline.storage.tables import FILTER_COLUMNS, PRIMARY, RATE_COLUMNS, REFERENCE_COLUMNS, RESULTS_COLUMNS
from pipeline.storage.task_data import read_meta, read_split, read_task, read_training
from pipeline.storage.tokenizers import read_tokenizer

_PLACEHOLDER = SequenceTotals(*torch.ones(3, 1))


class Job(NamedTuple):
    """One trained model."""

    variant: str
    learning_rate: float
    seed: int


def evaluate(
    task: str,
    trained: dict[str, CellTraining],
    precision: str,
    every_rate: Collection[str] = (),
    *,
    device: str,
    parallel_runs: int | Literal["auto"],
) -> None:
    """Score every trained variant and seed at every length it supports; measure attention at the training length.

    The variants in `every_rate` are scored at all learning rates, the others at the chosen one. The values of a diverged seed
    are empty. A model that has been scored before is not scored again: see pipeline/storage/scored.py.
    """
    data = read_task(task)
    chosen = {variant: runs.read_summary(task, variant)["learning_rate"] for variant in trained}
    main = [Job(variant, chosen[variant], seed) for variant, training in trained.items() for seed in training.seeds]
    others = [
        Job(variant, rate, seed)
        for variant in every_rate
        for rate in trained[variant].learning_rates
        for seed in trained[variant].seeds
    ]
    torch_device = resolve_device(device)
    keys = _keys(task, data, precision, [*dict.fromkeys([*main, *others])], torch_device)
    found = _results(task, data, precision, keys, device=torch_device, parallel_runs=parallel_runs)
    with atomic_write(RESULTS / f"{task}.csv") as path:
        write_csv(path, (row for job in main for row in _named(task, job, found[job].scores)), RESULTS_COLUMNS)
    with atomic_write(FILTERS / f"{task}.csv") as path:
        write_csv(path, (row for job in main for row in _named(task, job, found[job].filters)), FILTER_COLUMNS)
    with atomic_write(RATES / f"{task}.csv") as path:
        rates = ({"learning_rate": job.learning_rate, **row} for job in others for row in _named(task, job, found[job].scores))
        write_csv(path, (row for row in rates if row["metric"] == PRIMARY[data.goal]), RATE_COLUMNS)
    with atomic_write(REFERENCES / f"{task}.csv") as path:
        write_csv(path, references(task, data), REFERENCE_COLUMNS)
    sequences = {(job.variant, job.seed, length): scores for job in main for length, scores in found[job].sequences.items()}
    write_scores(SCORES / f"{task}.npz", sequences, text=data.goal == "loss")
    checkpoints.prune(task, trained)
    prune_scored(task, keys.values())


def references(task: str, data: Task) -> Rows:
    """Score the partial strategies of a task on its test splits: one row per strategy and length."""
    if not data.reference_names:
        return []
    generated = GeneratedData(
        tests={length: read_split(task, f"test_{length}") for length in data.lengths},
        training=list(read_training(task)),
        vocabulary=read_meta(task).vocabulary,
        extents=_extents(task) if data.goal == "loss" else None,
        tokenizer=read_tokenizer(task) if data.goal == "loss" else None,
    )
    multiples = dict(zip(data.lengths, data.multiples, strict=True))
    return [
        {
            "task": task,
            "reference": name,
            "length": length,
            "multiple": float(multiples[length]),
            "metric": PRIMARY[data.goal],
            "value": value,
        }
        for name, values in data.score_references(generated).items()
        for length, value in values.items()
    ]


def metrics(totals: SequenceTotals, extents: Extents | None, *, autoregressive: bool) -> dict[str, float]:
    """Compute the metrics of a task by name.

    Autoregressive scoring leaves out the loss, which would mix two kinds of inputs.

    For text, `loss` and `perplexity` are per token. `word_perplexity` counts the end of a line as a word. `bits_per_byte` adds
    eight bits per byte of each word outside the vocabulary; both allow a comparison of tokenizers.
    """
    scores = Scores.of(totals)
    if extents is None:
        shares = {"accuracy": scores.accuracy, "sequence_accuracy": scores.sequence_accuracy}
        return shares if autoregressive else {**shares, "loss": scores.loss}
    tokens, (size, words, unknown) = totals.targets.sum().item(), (int(column.sum()) for column in extents)
    return {
        "loss": scores.loss,
        "perplexity": scores.perplexity,
        "word_perplexity": scores._replace(loss=scores.loss * tokens / words if words else math.inf).perplexity,
        "bits_per_byte": scores.bits * (tokens / size) + 8 * unknown / size,
        "accuracy": scores.accuracy,
    }


def _keys(task: str, data: Task, precision: str, jobs: Sequence[Job], device: torch.device) -> dict[Job, str]:
    """The key of each job: a digest of everything that its scores depend on. Seeds with equal weights have equal keys."""
    tests = {path.name: sha256(path) for path in sorted((HELDOUT / task).iterdir())}
    models = {variant: runs.read_summary(task, variant)["model"] for variant in {job.variant for job in jobs}}
    code = {variant: _code(data, model) for variant, model in models.items()}

    def key(job: Job) -> str:
        path = _weights(task, job)
        # Loading the model says what to do about a missing file.
        weights = sha256(path) if path is not None and path.exists() else path
        parts = weights, models[job.variant], code[job.variant], tests, precision, made_on(device)
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    return {job: key(job) for job in jobs}


def _code(data: Task, model: dict[str, Any]) -> str:
    """The digest of the code that scores a model on a task."""
    mixers = (mixer_module(mixer.mixer, "layer") for mixer in read_model(model["config"]).mixers)
    return code_digest([__name__, module_of(data.kind), *mixers])


def _weights(task: str, job: Job) -> Path | None:
    """The weights file of a run; None if it diverged."""
    summary = runs.read_summary(task, job.variant)
    (run,) = (run for run in summary["runs"] if (run["learning_rate"], run["seed"]) == job[1:])
    rate = None if job.learning_rate == summary["learning_rate"] else job.learning_rate
    return None if run["stop"] == "diverged" else runs.weights_path(task, job.variant, job.seed, rate)


def _results(
    task: str,
    data: Task,
    precision: str,
    keys: Mapping[Job, str],
    *,
    device: torch.device,
    parallel_runs: int | Literal["auto"],
) -> dict[Job, ModelResults]:
    """Return the results of each job: the kept results of its key, or the scores of the first job with this key."""
    found = {key: results for key in set(keys.values()) if (results := read_scored(task, key)) is not None}
    new = {key: job for job, key in reversed([*keys.items()]) if key not in found}
    # The largest model first, so that no process has to wait for it at the end.
    jobs = sorted(new.values(), key=lambda job: _size(_weights(task, job)), reverse=True)
    with tqdm(total=len(jobs), desc=f"evaluate {task}", unit="model", disable=None) as bar:

        def advance(done: int) -> None:
            bar.update(done)

        function = functools.partial(_evaluate_and_keep, task, data, precision, keys)
        tables = workers.parallel_map(function, jobs, device=device, parallel_runs=parallel_runs, report=advance)
    found |= {keys[job]: table for job, table in zip(jobs, tables, strict=True)}
    return {job: found[key] for job, key in keys.items()}


def _size(path: Path | None) -> int:
    return path.stat().st_size if path is not None and path.exists() else 0


def _evaluate_and_keep(
    task: str,
    data: Task,
    precision: str,
    keys: Mapping[Job, str],
    job: Job,
    device: torch.device,
    report: workers.Report,
) -> ModelResults:
    results = _evaluate_model(task, data, precision, job, device, report)
    write_scored(task, keys[job], results)
    return results


def _evaluate_model(
    task: str, data: Task, precision: str, job: Job, device: torch.device, report: workers.Report
) -> ModelResults:
    path, max_length = _weights(task, job), runs.max_length(task, job.variant)
    model = None if path is None else runs.load_model(path).to(device)
    extents = _extents(task) if data.goal == "loss" else None
    rows: Rows = []
    sequences: dict[int, SequenceScores] = {}
    if model is not None:
        rows += _tidy(data.length, _attention(task, data, model, device))
    for length in data.lengths:
        if max_length is not None and length > max_length:
            continue
        recalled = _recalled(task, length)
        if model is None:
            values = dict.fromkeys(metrics(_PLACEHOLDER, extents, autoregressive=data.autoregressive), math.nan)
            values |= dict.fromkeys(ByRecall._fields if recalled else (), math.nan)
            values |= dict.fromkeys((f"accuracy_{name}" for name in data.part_names), math.nan)
        else:
            split = runs.split(task, f"test_{length}", device)
            parts = list(token_scores(model, split, precision=precision, autoregressive=data.autoregressive))
            totals = SequenceTotals.of(parts)
            if extents is not None:
                totals = totals.grouped(len(extents.bytes))
            sequences[length] = _sequences(totals, extents, autoregressive=data.autoregressive)
            values = metrics(totals, extents, autoregressive=data.autoregressive)
            if recalled:
                losses = torch.cat([part.loss[part.is_target].double().cpu() for part in parts]).numpy()
                values |= loss_by_recall(losses.reshape(recalled.recalled.shape), *recalled)._asdict()
            if data.part_names:
                answer_parts = data.parts(read_split(task, f"test_{length}"))
                values |= accuracy_by_part(parts, split.positions.long().cpu().numpy(), answer_parts)
        rows += _tidy(length, values.items())
    report(1)
    return ModelResults(rows, [] if model is None else _filters(model), sequences)


def _sequences(totals: SequenceTotals, extents: Extents | None, *, autoregressive: bool) -> SequenceScores:
    loss, correct, targets = (column.numpy() for column in totals)
    if extents is None:
        return SequenceScores(correct, targets, None if autoregressive else loss / targets)
    return SequenceScores((loss / math.log(2) + 8 * extents.unknown) / extents.bytes, extents.bytes, None)


def _extents(task: str) -> Extents:
    with np.load(HELDOUT / task / "extents.npz", allow_pickle=False) as arrays:
        return Extents(**arrays)


def _recalled(task: str, length: int) -> Recalled | None:
    path = HELDOUT / task / "recalled.npz"
    if not path.exists():
        return None
    with np.load(path, allow_pickle=False) as arrays:
        return Recalled(*(arrays[f"{kind}_{length}"] for kind in Recalled._fields))


def _attention(task: str, data: Task, model: SequenceModel, device: torch.device) -> Iterator[tuple[str, float]]:
    """(metric, value) of each attention layer at the training length."""
    examples = read_split(task, f"test_{data.length}")
    answer_positions = data.answer_positions(examples)
    inputs = torch.tensor(examples.inputs, device=device).long()
    is_target = torch.tensor(examples.targets >= 0, device=device)
    positions = None if answer_positions is None else torch.tensor(answer_positions, device=device)
    for layer, statistics in enumerate(attention_statistics(model, inputs, is_target, positions), 1):
        if statistics is not None:
            yield f"attention_entropy_{layer}", statistics.entropy
            if statistics.on_answer is not None:
                yield f"attention_on_answer_{layer}", statistics.on_answer


def _filters(model: SequenceModel) -> Rows:
    return [
        {"layer": layer, "projection": projection, "head": head, "lag": index * dilation, "value": f"{value:.6g}"}
        for layer, projection, head, kernel, dilation in filter_kernels(model)
        for index, value in enumerate(kernel)
    ]


def _tidy(length: int, values: Iterable[tuple[str, float]]) -> Rows:
    return [{"length": length, "metric": metric, "value": value} for metric, value in values]


def _named(task: str, job: Job, rows: Rows) -> Iterator[dict[str, Any]]:
    return ({"task": task, "variant": job.variant, "seed": job.seed, **row} for row in rows)
