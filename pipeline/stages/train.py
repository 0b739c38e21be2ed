"""Train one cell: a variant on a task, with every learning rate and seed.

The validation split chooses the learning rate. A restarted stage resumes from checkpoints (runtime/checkpoints.py). Under
torchrun, several processes train each run together (training/distributed.py), and the process with rank 0 writes the files.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib import import_module
from itertools import chain
from typing import Any, Literal, NamedTuple

import safetensors.numpy
import torch
from filelock import FileLock
from numpy.typing import NDArray
from tqdm import tqdm

from cat.config import TrainingConfig
from cat.evaluation.diagnostics import head_entropies, key_filter_solves_every_length, max_logit
from cat.evaluation.scores import MixedSplit, Split, TrainingSplit, score
from cat.mixers.registry import AnyVariant, ConstructionConfig
from cat.model import SequenceModel
from cat.seeding import derive_seed
from cat.tasks.registry import Task
from cat.training.distributed import SINGLE_PROCESS, ProcessGroup, local_rank, process_group
from cat.training.ensemble import can_ensemble, fit_ensemble
from cat.training.fit import Run, ValidationRecord, build_model, fit, validation_record
from pipeline.config.load import load_study
from pipeline.config.resolve import resolved
from pipeline.config.study import CellTraining, Study
from pipeline.runtime import workers
from pipeline.runtime.checkpoints import Checkpoint, CheckpointWriter, checkpoint_path
from pipeline.runtime.determinism import MARK
from pipeline.runtime.devices import made_on, own_device
from pipeline.storage import runs
from pipeline.storage.files import atomic_write, write_csv, write_json
from pipeline.storage.paths import CHECKPOINTS, LOGS
from pipeline.storage.provenance import provenance
from pipeline.storage.tables import HISTORY_COLUMNS
from pipeline.storage.task_data import Meta, read_code, read_meta

LOG_SECONDS = 60
"""Time between two lines of progress without a terminal."""
MAX_ENSEMBLE_TOKENS = 1 << 18
"""Tokens per training step of an ensemble of runs at most; bounds its GPU memory."""


class CellSetting(NamedTuple):
    """The parameters of a cell: those in its file in plan/."""

    model: AnyVariant
    training: CellTraining
    precision: Literal["float32", "bfloat16"]

    @classmethod
    def of(cls, study: Study, task: str, variant: str) -> CellSetting:
        return cls(study.variants[variant], study.training[task, variant], study.precision)


class Cell(NamedTuple):
    """A variant on a task, with its parameters, data and code."""

    task: str
    variant: str
    setting: CellSetting
    meta: Meta
    code: str | None
    """The digest of the cell's code in plan/; None if the study has not been planned."""
    construction_task: Task | None = None
    """The task that a construction's weights solve, up to its longest sequences; None for trained variants."""

    @classmethod
    def of(cls, task: str, variant: str, setting: CellSetting) -> Cell:
        """Read the cell's data description and code digest from their files."""
        construction_task = load_study().tasks[task].data if isinstance(setting.model, ConstructionConfig) else None
        return cls(task, variant, setting, read_meta(task), read_code(task, variant), construction_task)

    @property
    def jobs(self) -> list[Job]:
        """The runs of the cell. A construction has no learning rate."""
        rates = (0.0,) if isinstance(self.setting.model, ConstructionConfig) else self.setting.training.learning_rates
        return [Job(rate, seed) for rate in rates for seed in self.setting.training.seeds]


class Job(NamedTuple):
    """One run of a cell."""

    learning_rate: float
    seed: int


Records = dict[Job, ValidationRecord]
"""The last validation of some runs."""
Message = tuple[int, Records]
"""What a job reports: its steps since its last report, and new records."""


class Trained(NamedTuple):
    """The result of one run."""

    job: Job
    history: list[ValidationRecord]
    steps: int
    stop: str
    parameters: int
    solves_every_length: bool | None
    """Whether the key filter meets the condition of `diagnostics`; None if the condition does not apply to the model."""
    entropy: list[list[float] | None] | None
    """Attention entropy on the validation split by layer and head, in nats; None if the run diverged."""
    config: dict[str, Any]
    weights: dict[str, NDArray[Any]]
    device: str
    """Name of the hardware and software that the results depend on."""
    seconds: float
    """Training time, including that of earlier, interrupted calls; for an ensemble the run's share."""
    micro_batch: int | None = None

    @property
    def diverged(self) -> bool:
        return self.stop == "diverged"


def train(
    task: str,
    variant: str,
    setting: CellSetting,
    *,
    device: str,
    parallel_runs: int | Literal["auto"],
    observe: Callable[[Cell, Records], None] = lambda cell, records: None,
) -> None:
    """Train the cell and write its folder. `observe` is called with the new validation records of runs.

    Ctrl-C stops after the current training step; the next call resumes there. Raises ParamsError if the device does not
    exist, KeyboardInterrupt after Ctrl-C.
    """
    began, origin = time.time(), provenance()
    torch_device = own_device(device, local_rank())
    cell = Cell.of(task, variant, setting)
    steps = len(cell.jobs) * setting.training.steps
    with process_group(torch_device) as group, workers.stoppable():
        hidden = None if group.rank == 0 else True
        with tqdm(total=steps, desc=f"{task} {variant}", unit="step", disable=hidden) as bar:
            run = functools.partial(train_jobs, cell, group=group)
            log = _log_each_minute(f"{task} {variant}", steps)

            def report(message: Message) -> None:
                _advance(bar, message)
                if group.rank == 0:
                    log(message)
                    observe(cell, message[1])

            job_groups = group_jobs(cell, torch_device, group)
            processes = parallel_runs if group.size == 1 else 1
            trained = workers.parallel_map(run, job_groups, device=torch_device, parallel_runs=processes, report=report)
    if group.rank == 0:
        write(cell, list(chain.from_iterable(trained)), began=began, origin=origin)


def write(cell: Cell, outcomes: list[Trained], *, began: float, origin: dict[str, Any]) -> None:
    """Write the cell's folder (summary, history, weights) and its log.

    `origin` is the provenance of the code when training began: the checkout may have changed since then.
    """
    task, variant, meta = cell.task, cell.variant, cell.meta
    chosen = choose_learning_rate(outcomes, meta.goal)
    model = {"config": outcomes[0].config, "vocabulary": meta.vocabulary, "length": meta.length}
    with FileLock(CHECKPOINTS / task / variant / "write.lock"), atomic_write(runs.folder(task, variant)) as folder:
        folder.mkdir()
        for outcome in outcomes:
            if not outcome.diverged:
                content = safetensors.numpy.save(outcome.weights, metadata={"model": json.dumps(model, sort_keys=True)})
                rate = None if outcome.job.learning_rate == chosen else outcome.job.learning_rate
                (folder / runs.weights_path(task, variant, outcome.job.seed, rate).name).write_bytes(content)
        rows = [{**outcome.job._asdict(), **asdict(record)} for outcome in outcomes for record in outcome.history]
        write_csv(folder / "history.csv", rows, HISTORY_COLUMNS)
        head = {"task": task, "variant": variant, "model": model, "device": outcomes[0].device, "learning_rate": chosen}
        write_json(folder / "summary.json", {**head, **_summary(outcomes)})
    spent = math.fsum(outcome.seconds for outcome in outcomes)
    log = {**origin, "started": began, "seconds": spent, "summary": runs.digest(task, variant)}
    with atomic_write(LOGS / task / f"{variant}.json") as path:
        write_json(path, log)


def choose_learning_rate(outcomes: list[Trained], goal: str) -> float:
    """Choose the learning rate with the best mean validation score over seeds.

    Rates with fewer diverged seeds come first. Then the higher accuracy wins, and for equal accuracies the lower loss. If the
    goal is the loss, only the loss counts.
    """

    def merit(rate: float) -> tuple[float, ...]:
        group = [o for o in outcomes if o.job.learning_rate == rate]
        ended = [o.history[-1] for o in group if not o.diverged]
        if not ended:
            return (-len(group),)
        loss = math.fsum(record.valid_loss for record in ended) / len(ended)
        accuracy = math.fsum(record.valid_accuracy for record in ended) / len(ended)
        return (len(ended) - len(group), *((accuracy, -loss) if goal == "accuracy" else (-loss,)))

    return max(dict.fromkeys(o.job.learning_rate for o in outcomes), key=merit)


def group_jobs(cell: Cell, device: torch.device, group: ProcessGroup = SINGLE_PROCESS) -> list[tuple[Job, ...]]:
    """Split the runs of the cell into groups that train as one ensemble.

    One small model does not fill a GPU, so an ensemble there has up to MAX_ENSEMBLE_TOKENS tokens per step. On a CPU each run
    trains by itself, so its last bits do not depend on the other runs. So does a run that is compiled, splits its batches, uses
    several processes, or has several training lengths.
    """
    setting, jobs = cell.setting, cell.jobs
    tokens = setting.training.batch * cell.meta.length
    size = max(1, MAX_ENSEMBLE_TOKENS // tokens) if uses_ensemble(cell, device, group) else 1
    return [tuple(jobs[i : i + size]) for i in range(0, len(jobs), size)]


def uses_ensemble(cell: Cell, device: torch.device, group: ProcessGroup = SINGLE_PROCESS) -> bool:
    """Whether `fit_ensemble` trains the cell, even a single run of it: its steps are CUDA graphs."""
    model, training = cell.setting.model, cell.setting.training
    single = training.compile or training.micro_batch is not None or group.size > 1 or len(cell.meta.training_lengths) > 1
    return device.type == "cuda" and not single and not isinstance(model, ConstructionConfig) and can_ensemble(model)


def train_jobs(
    cell: Cell, jobs: tuple[Job, ...], device: torch.device, report: workers.Report, group: ProcessGroup = SINGLE_PROCESS
) -> list[Trained]:
    """Train these runs of the cell; an ensemble that runs out of GPU memory is retried one run at a time.

    `report` is called with a Message. A resumed run first reports the records of its checkpoint.
    """
    if isinstance(cell.setting.model, ConstructionConfig):
        return [_construct(cell, job, device, report) for job in jobs]
    device_name = made_on(device, group.size)
    reported = dict.fromkeys(jobs, 0)

    def progress(job: Job, step: int, record: ValidationRecord | None) -> None:
        if record is not None:
            report((step - reported[job], {job: record}))
            reported[job] = step

    trained: dict[Job, tuple[Run, float]] = {}
    with contextlib.ExitStack() as locks:
        for job in jobs if group.rank == 0 else ():
            locks.enter_context(_checkpoint(cell, job, device_name).exclusive())
        waiting, single = group.broadcast(lambda: _group_by_step(cell, jobs, device_name)), set[Job]()
        while waiting:
            members = waiting.pop()
            ensemble = len(members) > 1 or (uses_ensemble(cell, device, group) and members[0] not in single)
            try:
                trained |= zip(members, _fit(cell, members, device, progress, group, ensemble), strict=True)
            except torch.OutOfMemoryError:
                if not ensemble:
                    raise
                single |= set(members)  # `fit` can split a batch, `fit_ensemble` cannot
                waiting += [(job,) for job in members]
    report((sum(cell.setting.training.steps - steps for steps in reported.values()), {}))
    return [
        _trained(cell, job, run.model, run.history, run.steps, run.stop, device_name, seconds, run.micro_batch)
        for job, (run, seconds) in ((job, trained[job]) for job in jobs)
    ]


def _group_by_step(cell: Cell, jobs: tuple[Job, ...], device_name: str) -> list[tuple[Job, ...]]:
    """Group the runs by the step of their checkpoint; runs without one are at step 0.

    A run that has ended, or that splits its batches, is a group by itself.
    """
    groups: dict[Any, tuple[Job, ...]] = {}
    for job in jobs:
        saved = _checkpoint(cell, job, device_name).read()
        state = saved and saved.state
        key = job if state and (state.stop or state.micro_batch) else state.step if state else 0
        groups[key] = (*groups.get(key, ()), job)
    return list(groups.values())


def _fit(
    cell: Cell,
    jobs: tuple[Job, ...],
    device: torch.device,
    progress: Callable[[Job, int, ValidationRecord | None], None],
    group: ProcessGroup,
    ensemble: bool,
) -> list[tuple[Run, float]]:
    """Train these runs from their checkpoints on, as one ensemble or a single run; return each with its seconds."""
    task, setting, meta = cell.task, cell.setting, cell.meta
    assert not isinstance(setting.model, ConstructionConfig)
    train, valid = _splits(task, device)
    models = [
        build_model(
            setting.model, vocabulary=meta.vocabulary, length=meta.length, seed=derive_seed(job.seed, task, "weights")
        ).to(device)
        for job in jobs
    ]
    checkpoints = [_checkpoint(cell, job, made_on(device, group.size)) for job in jobs]
    saved = group.broadcast(lambda: [checkpoint.read() for checkpoint in checkpoints])
    states = [checkpoint and checkpoint.state for checkpoint in saved]
    keeper = CheckpointWriter(checkpoints, saved, group)
    for job, state in zip(jobs, states, strict=True):
        for record in state.history if state else ():
            progress(job, record.step, record)
    seeds = [derive_seed(job.seed, task, "batches") for job in jobs]
    rates = [job.learning_rate for job in jobs]
    options: dict[str, Any] = {
        "config": TrainingConfig(**setting.training.run),
        "stop_early": meta.goal == "accuracy",
        "precision": setting.precision,
    }
    if ensemble and not any(state and (state.stop or state.micro_batch) for state in states):
        assert not isinstance(train, MixedSplit)  # uses_ensemble: a CUDA graph has one shape
        options |= {"progress": lambda index, *news: progress(jobs[index], *news), "checkpoint": keeper}
        resume = [state for state in states if state is not None]
        trained = fit_ensemble(models, train, valid, learning_rates=rates, seeds=seeds, resume=resume or None, **options)
        return [(run, keeper.seconds(index)) for index, run in enumerate(trained)]
    options |= {
        "progress": functools.partial(progress, jobs[0]),
        "checkpoint": lambda state, ended: keeper(lambda: {0: state()}, ended),
        "group": group,
    }
    run = fit(models[0], train, valid, learning_rate=rates[0], seed=seeds[0], resume=states[0], **options)
    return [(run, keeper.seconds(0))]


def _checkpoint(cell: Cell, job: Job, device_name: str) -> Checkpoint:
    """The run's checkpoint. Its key covers all that the run depends on, so not the cell's other seeds and learning rates."""
    model, training, precision = cell.setting
    run = {key: value for key, value in resolved(training).items() if key not in ("learning_rates", "seeds")}
    parts = resolved(model), run, precision, cell.meta, job, device_name, MARK in os.environ, cell.code, torch.__version__
    key = hashlib.sha256(repr(parts).encode()).hexdigest()
    return Checkpoint(checkpoint_path(cell.task, cell.variant, *job), key if cell.code else None)


def _construct(cell: Cell, job: Job, device: torch.device, report: workers.Report) -> Trained:
    """Build the construction for the task and score it; it depends on no seed and no learning rate."""
    start = time.perf_counter()
    assert cell.construction_task is not None
    assert isinstance(cell.setting.model, ConstructionConfig)
    # Imported by name, so that only constructions depend on this module (pipeline/config/code_digest.py).
    model = import_module("cat.theory").construct(cell.construction_task, cell.setting.model.placement).to(device)
    _, valid = _splits(cell.task, device)
    scores = score(model, valid, precision=cell.setting.precision)
    report((cell.setting.training.steps, {}))
    record = validation_record(0, [math.nan], [math.nan], scores.loss, scores.accuracy, max_logit(model, valid.inputs))
    return _trained(cell, job, model, [record], 0, "theorem", made_on(device), time.perf_counter() - start)


@functools.lru_cache(maxsize=2)
def _splits(task: str, device: torch.device) -> tuple[TrainingSplit | MixedSplit, Split]:
    return runs.training_split(task, device), runs.split(task, "valid", device)


def _trained(
    cell: Cell,
    job: Job,
    model: SequenceModel,
    history: list[ValidationRecord],
    steps: int,
    stop: str,
    device: str,
    seconds: float,
    micro_batch: int | None = None,
) -> Trained:
    return Trained(
        job,
        history,
        steps,
        stop,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        solves_every_length=key_filter_solves_every_length(model),
        entropy=None if stop == "diverged" else head_entropies(model, _splits(cell.task, model.head.weight.device)[1].inputs),
        config=model.config.model_dump(mode="json"),
        weights={name: tensor.numpy(force=True).copy() for name, tensor in model.state_dict().items()},
        device=device,
        seconds=seconds,
        micro_batch=micro_batch,
    )


def _advance(bar: tqdm, message: Message) -> None:
    steps, records = message
    for record in records.values():
        bar.set_postfix(loss=f"{record.train_loss:.3f}", accuracy=f"{record.valid_accuracy:.3f}", refresh=False)
    bar.update(steps)


def _log_each_minute(name: str, total: int) -> Callable[[Message], None]:
    """Return a function that prints the progress of a cell once per LOG_SECONDS if no terminal shows a bar."""
    done, last = 0, time.monotonic()

    def log(message: Message) -> None:
        nonlocal done, last
        done += message[0]
        now = time.monotonic()
        if message[1] and now - last >= LOG_SECONDS and not sys.stderr.isatty():
            last = now
            record = [*message[1].values()][-1]
            scores = f"loss {record.train_loss:.3f}, accuracy {record.valid_accuracy:.3f}"
            print(f"{name}: {done:,} of {total:,} steps, {scores}", file=sys.stderr, flush=True)

    return log


def _summary(outcomes: list[Trained]) -> dict[str, Any]:
    return {
        "parameters": outcomes[0].parameters,
        "runs": [
            {
                **outcome.job._asdict(),
                "stop": outcome.stop,
                "steps": outcome.steps,
                "solves_every_length": outcome.solves_every_length,
                "attention_entropy": outcome.entropy,
                "valid_loss": outcome.history[-1].valid_loss if outcome.history and not outcome.diverged else None,
                "valid_accuracy": outcome.history[-1].valid_accuracy if outcome.history and not outcome.diverged else None,
                **({"micro_batch": outcome.micro_batch} if outcome.micro_batch else {}),
            }
            for outcome in outcomes
        ],
    }
