"""One cell: a variant on a task, every learning rate and seed of it; the validation split chooses the learning rate.

What had been trained of it when a run of this was ended, however that was, is not trained again (runtime/checkpoints.py).
Started by torchrun, it is several processes that train each run together (training/distributed.py), of which the first writes.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import os
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

from cat.config import OptimizerConfig, TrainingConfig
from cat.evaluation.diagnostics import head_entropies, key_filter_solves_every_length, max_logit
from cat.evaluation.scores import Split, TrainingSplit, score
from cat.mixers.registry import AnyVariant, ConstructionConfig
from cat.model import SequenceModel
from cat.seeding import derive_seed
from cat.tasks.registry import Task
from cat.training.distributed import SINGLE_PROCESS, ProcessGroup, local_rank, process_group
from cat.training.ensemble import can_ensemble, fit_ensemble
from cat.training.fit import Run, ValidationRecord, build_model, fit, validation_record
from pipeline.config.load import load_study
from pipeline.runtime import workers
from pipeline.runtime.checkpoints import Checkpoint, Keeper
from pipeline.runtime.determinism import MARK
from pipeline.runtime.devices import made_on, own_device
from pipeline.storage import runs
from pipeline.storage.files import atomic_write, write_csv, write_json
from pipeline.storage.paths import CHECKPOINTS, LOGS
from pipeline.storage.provenance import provenance
from pipeline.storage.tables import HISTORY_COLUMNS
from pipeline.storage.task_data import Meta, read_code, read_meta

TOGETHER = 1 << 18
"""Tokens of a step in which several runs are trained at once; bounds their memory."""


class CellSetting(NamedTuple):
    """What a cell is trained with: exactly what its stage declares."""

    model: AnyVariant
    optimizer: OptimizerConfig
    training: TrainingConfig
    seeds: tuple[int, ...]
    precision: Literal["float32", "bfloat16"]


class Cell(NamedTuple):
    """A variant on a task, what it is trained with, on what data and by what code."""

    task: str
    variant: str
    setting: CellSetting
    meta: Meta
    code: str | None
    """The listing that `plan` has made of it; None where there is none."""
    theorem: Task | None = None
    """What a theorem is about, up to its longest sequences; None for what is trained, to which these are nothing."""

    @classmethod
    def of(cls, task: str, variant: str, setting: CellSetting) -> Cell:
        """The cell as it is now."""
        theorem = load_study().tasks[task].data if isinstance(setting.model, ConstructionConfig) else None
        return cls(task, variant, setting, read_meta(task), read_code(variant), theorem)

    @property
    def jobs(self) -> list[Job]:
        """Its runs; the weights of a theorem depend on no learning rate."""
        rates = (0.0,) if isinstance(self.setting.model, ConstructionConfig) else self.setting.training.learning_rates
        return [Job(rate, seed) for rate in rates for seed in self.setting.seeds]


class Job(NamedTuple):
    """One run of a cell."""

    learning_rate: float
    seed: int


class Trained(NamedTuple):
    """What came of a job."""

    job: Job
    history: list[ValidationRecord]
    steps: int
    stop: str
    parameters: int
    solves_every_length: bool | None
    """Whether the key filter meets the condition of `diagnostics`; None where the condition is about something else."""
    entropy: list[list[float] | None] | None
    """Of attention on the validation split, by layer and head, in nats; None where the run diverged."""
    config: dict[str, Any]
    weights: dict[str, NDArray[Any]]
    device: str
    """What the results depend on, in words."""
    seconds: float
    """Spent on it, whenever that was; of what was trained at once, its share."""
    micro_batch: int | None = None

    @property
    def diverged(self) -> bool:
        return self.stop == "diverged"


def train(task: str, variant: str, setting: CellSetting, *, device: str, parallel_runs: int | Literal["auto"]) -> None:
    """Trains the cell and writes its folder. Raises ParamsError where the device does not exist.

    Ctrl-C ends it after the step that it is in, which the next call goes on from; raises KeyboardInterrupt then.
    """
    began, origin = time.time(), provenance()
    where = own_device(device, local_rank())
    cell = Cell.of(task, variant, setting)
    steps = len(cell.jobs) * setting.training.steps
    with process_group(where) as group, workers.stoppable():
        hidden = None if group.rank == 0 else True
        with tqdm(total=steps, desc=f"{task} {variant}", unit="step", disable=hidden) as bar:
            run, report = functools.partial(train_jobs, cell, group=group), functools.partial(_advance, bar)
            together = group_jobs(cell, where, group)
            side_by_side = parallel_runs if group.size == 1 else 1
            trained = workers.parallel_map(run, together, device=where, parallel_runs=side_by_side, report=report)
    if group.rank == 0:
        write(cell, list(chain.from_iterable(trained)), began=began, origin=origin)


def write(cell: Cell, outcomes: list[Trained], *, began: float, origin: dict[str, Any]) -> None:
    """Writes the cell's folder: summary, history, and the weights of the learning rate that is chosen; and its log.

    `origin` is the provenance of the code when training began: the checkout may have moved on since.
    """
    task, variant, meta = cell.task, cell.variant, cell.meta
    chosen = choose_learning_rate(outcomes, meta.goal)
    about = {"config": outcomes[0].config, "vocabulary": meta.vocabulary, "length": meta.length}
    with FileLock(CHECKPOINTS / task / variant / "write.lock"), atomic_write(runs.folder(task, variant)) as folder:
        folder.mkdir()
        for outcome in outcomes:
            if outcome.job.learning_rate == chosen and not outcome.diverged:
                content = safetensors.numpy.save(outcome.weights, metadata={"model": json.dumps(about, sort_keys=True)})
                (folder / f"seed_{outcome.job.seed}.safetensors").write_bytes(content)
        rows = [{**outcome.job._asdict(), **asdict(row)} for outcome in outcomes for row in outcome.history]
        write_csv(folder / "history.csv", rows, HISTORY_COLUMNS)
        head = {"task": task, "variant": variant, "model": about, "device": outcomes[0].device, "learning_rate": chosen}
        write_json(folder / "summary.json", {**head, **_summary(outcomes)})
    spent = math.fsum(outcome.seconds for outcome in outcomes)
    log = {**origin, "started": began, "seconds": spent, "summary": runs.digest(task, variant)}
    with atomic_write(LOGS / task / f"{variant}.json") as path:
        write_json(path, log)


def choose_learning_rate(outcomes: list[Trained], goal: str) -> float:
    """The learning rate that is best on the validation split in the mean over seeds.

    Rates at which fewer seeds diverged come first; then accuracy, the lower loss among equals, or on text the loss alone.
    """

    def merit(rate: float) -> tuple[float, ...]:
        group = [o for o in outcomes if o.job.learning_rate == rate]
        ended = [o.history[-1] for o in group if not o.diverged]
        if not ended:
            return (-len(group),)
        loss = math.fsum(row.valid_loss for row in ended) / len(ended)
        accuracy = math.fsum(row.valid_accuracy for row in ended) / len(ended)
        return (len(ended) - len(group), *((accuracy, -loss) if goal == "accuracy" else (-loss,)))

    return max(dict.fromkeys(o.job.learning_rate for o in outcomes), key=merit)


def group_jobs(cell: Cell, device: torch.device, group: ProcessGroup = SINGLE_PROCESS) -> list[tuple[Job, ...]]:
    """The runs of the cell that are trained at once.

    On a GPU, which one small model does not fill, they are as many as have TOGETHER tokens in a step. On a CPU every run is
    by itself, and so are its last bits; and so is one that is compiled, takes its batches in parts, or is trained by several
    processes.
    """
    setting, jobs = cell.setting, cell.jobs
    size = max(1, TOGETHER // (setting.training.batch * cell.meta.length)) if uses_ensemble(cell, device, group) else 1
    return [tuple(jobs[i : i + size]) for i in range(0, len(jobs), size)]


def uses_ensemble(cell: Cell, device: torch.device, group: ProcessGroup = SINGLE_PROCESS) -> bool:
    """Whether its runs are trained by `fit_together`, whose steps are replayed, one that is by itself too."""
    model, schedule = cell.setting.model, cell.setting.training
    alone = schedule.compile or schedule.micro_batch is not None or group.size > 1
    return device.type == "cuda" and not alone and not isinstance(model, ConstructionConfig) and can_ensemble(model)


def train_jobs(
    cell: Cell, jobs: tuple[Job, ...], device: torch.device, report: workers.Report, group: ProcessGroup = SINGLE_PROCESS
) -> list[Trained]:
    """Trains these models of the cell at once; `report` is told (steps done since it was last told, row or None)."""
    if isinstance(cell.setting.model, ConstructionConfig):
        return [_prescribe(cell, job, device, report) for job in jobs]
    where = made_on(device, group.size)
    told = dict.fromkeys(jobs, 0)

    def progress(job: Job, step: int, row: ValidationRecord | None) -> None:
        if row is not None:
            report((step - told[job], row))
            told[job] = step

    trained: dict[Job, tuple[Run, float]] = {}
    with contextlib.ExitStack() as locks:
        for job in jobs if group.rank == 0 else ():
            locks.enter_context(_checkpoint(cell, job, where).alone())
        waiting, alone = group.broadcast(lambda: _standing(cell, jobs, where)), set[Job]()
        while waiting:
            alike = waiting.pop()
            together = len(alike) > 1 or (uses_ensemble(cell, device, group) and alike[0] not in alone)
            try:
                trained |= zip(alike, _fit(cell, alike, device, progress, group, together), strict=True)
            except torch.OutOfMemoryError:
                if not together:
                    raise
                alone |= set(alike)  # a batch in parts, of which replicas know nothing
                waiting += [(job,) for job in alike]
    report((sum(cell.setting.training.steps - steps for steps in told.values()), None))
    return [
        _trained(cell, job, run.model, run.history, run.steps, run.stop, where, seconds, run.micro_batch)
        for job, (run, seconds) in ((job, trained[job]) for job in jobs)
    ]


def _standing(cell: Cell, jobs: tuple[Job, ...], where: str) -> list[tuple[Job, ...]]:
    """The runs in groups of those that stand at the same step, all that have not begun in one.

    Each that has ended, or takes its batches in parts, is by itself.
    """
    groups: dict[Any, tuple[Job, ...]] = {}
    for job in jobs:
        kept = _checkpoint(cell, job, where).read()
        state = kept and kept.state
        key = job if state and (state.stop or state.micro_batch) else state.step if state else 0
        groups[key] = (*groups.get(key, ()), job)
    return list(groups.values())


def _fit(
    cell: Cell,
    jobs: tuple[Job, ...],
    device: torch.device,
    progress: Callable[[Job, int, ValidationRecord | None], None],
    group: ProcessGroup,
    together: bool,
) -> list[tuple[Run, float]]:
    """Trains these models at once, from where they stand, and the seconds spent on each; not `together`, one model."""
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
    kept = group.broadcast(lambda: [checkpoint.read() for checkpoint in checkpoints])
    states = [one and one.state for one in kept]
    keep = Keeper(checkpoints, kept, group)
    seeds = [derive_seed(job.seed, task, "batches") for job in jobs]
    rates = [job.learning_rate for job in jobs]
    options: dict[str, Any] = {
        "protocol": setting.optimizer,
        "schedule": setting.training,
        "stop_early": meta.goal == "accuracy",
        "precision": setting.precision,
    }
    if together and not any(state and (state.stop or state.micro_batch) for state in states):
        options |= {"progress": lambda place, *news: progress(jobs[place], *news), "checkpoint": keep}
        resume = [state for state in states if state is not None]
        trained = fit_ensemble(models, train, valid, learning_rates=rates, seeds=seeds, resume=resume or None, **options)
        return [(run, keep.seconds(place)) for place, run in enumerate(trained)]
    options |= {
        "progress": functools.partial(progress, jobs[0]),
        "checkpoint": lambda state, ended: keep(lambda: {0: state()}, ended),
        "group": group,
    }
    run = fit(models[0], train, valid, learning_rate=rates[0], seed=seeds[0], resume=states[0], **options)
    return [(run, keep.seconds(0))]


def _checkpoint(cell: Cell, job: Job, where: str) -> Checkpoint:
    """Its key is made of all that the run depends on: other seeds and learning rates of the cell are nothing to it."""
    model, protocol, schedule, _, precision = cell.setting
    pinned = MARK in os.environ
    parts = model, protocol, schedule.model_dump(exclude={"learning_rates"}), precision, cell.meta, job, where, pinned
    key = hashlib.sha256(repr((*parts, cell.code, torch.__version__)).encode()).hexdigest()
    path = CHECKPOINTS / cell.task / cell.variant / f"{job.learning_rate}_{job.seed}.safetensors"
    return Checkpoint(path, key if cell.code else None)


def _prescribe(cell: Cell, job: Job, device: torch.device, report: workers.Report) -> Trained:
    """The weights of the theorem about the task, looked at once; they depend on no seed and no learning rate."""
    start = time.perf_counter()
    assert cell.theorem is not None
    # By name: only a cell of a theorem depends on this module (pipeline/config/code_digest.py).
    model = import_module("cat.theory").prescribed(cell.theorem).to(device)
    _, valid = _splits(cell.task, device)
    scores = score(model, valid, precision=cell.setting.precision)
    report((cell.setting.training.steps, None))
    row = validation_record(0, [math.nan], [math.nan], scores.loss, scores.accuracy, max_logit(model, valid.inputs))
    return _trained(cell, job, model, [row], 0, "theorem", made_on(device), time.perf_counter() - start)


@functools.lru_cache(maxsize=2)
def _splits(task: str, device: torch.device) -> tuple[TrainingSplit, Split]:
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


def _advance(bar: tqdm, message: tuple[int, ValidationRecord | None]) -> None:
    steps, row = message
    if row is not None:
        bar.set_postfix(loss=f"{row.train_loss:.3f}", accuracy=f"{row.valid_accuracy:.3f}", refresh=False)
    bar.update(steps)


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
