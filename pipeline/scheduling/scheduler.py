"""Many cells at a time: what `dvc repro` would train one after the other is trained in warm processes, then given to DVC.

    plan, generate     DVC reproduces what comes before training
    train              stale cells, all their runs side by side; a folder of runs/ is written when the last run of a cell ends
    the rest           DVC reproduces everything; a train stage whose outcome is there is recorded instead of run

The outcome, dvc.lock too, is that of `dvc repro`. A cell is recorded only if everything that its stage declares is still as it
was when its training began. DVC's lock is not held while cells are trained. This is the only module that knows DVC from inside.
"""

from __future__ import annotations

import math
import multiprocessing
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, NamedTuple

import torch
from dvc.repo import Repo

from cat.training.fit import ValidationRecord
from pipeline.config.load import load_study
from pipeline.runtime import workers
from pipeline.runtime.devices import resolve_devices
from pipeline.runtime.processes import available
from pipeline.scheduling import ray_cluster
from pipeline.scheduling.dvc_internals import (
    declared_dependencies,
    exclusive_run,
    is_restorable,
    parse_params_once,
    readable_dvc_errors,
    repair_rwlock,
    reproduce,
)
from pipeline.scheduling.progress import Progress
from pipeline.scheduling.ray_cluster import Cluster
from pipeline.stages.train import Cell, CellSetting, Job, Trained, choose_learning_rate, group_jobs, train_jobs, write
from pipeline.storage.files import atomic_write
from pipeline.storage.paths import LOGS
from pipeline.storage.provenance import provenance

FIRST = ("plan", "generate")
RECORDED = 300
"""Seconds after which what has been trained is recorded, so that no more is lost if this process is killed."""
SPARING = 10
"""And times as long as recording took last: of thousands of cells it takes minutes."""


class StageCell(NamedTuple):
    """A stage that trains a cell, and what it declared when training began."""

    stage: str
    cell: Cell
    declared: dict[str, Any]


class FailedCellsError(Exception):
    """Cells that could not be trained, each with the reason and where its log is."""


def run(*, jobs: int | None = None, ray: str | None = None) -> None:
    """Reproduces the study with `jobs` runs at a time, as many as there are cores or GPUs for None.

    Cells are trained in processes here, or on the Ray cluster at the address `ray`. Raises FailedCellsError where cells failed,
    once the others are trained and recorded; ValueError where a stage failed, the cluster cannot be reached or is lost, or
    another call is at work here; KeyboardInterrupt for Ctrl-C, once what is in training is kept and what is trained recorded.
    The cells that have failed until then are in a note of these.
    """
    study = load_study()
    devices = assign(resolve_devices(study.device), jobs)
    failures: dict[str, str] = {}
    with (
        _noted(failures),
        exclusive_run(),
        readable_dvc_errors(),
        ray_cluster.join(ray, study, jobs) if ray else nullcontext() as joined,
    ):
        repair_rwlock()
        reproduce(FIRST)
        stale = stale_cells()
        declared: dict[str, dict[str, Any]] = {}

        def record() -> None:
            if declared:
                reproduce(declared, declared)
                declared.clear()

        since, pause = time.monotonic(), float(RECORDED)
        try:
            # What runs on a cluster is called off, not asked to stop.
            with nullcontext() if joined else workers.stoppable():
                for stage, failure in train(stale, devices, joined):
                    if failure is not None:
                        failures[stage.stage] = failure
                        continue
                    declared[stage.stage] = stage.declared
                    if (began := time.monotonic()) - since > pause:
                        record()
                        since = time.monotonic()
                        pause = max(RECORDED, SPARING * (since - began))
        except (KeyboardInterrupt, ValueError) as error:
            if not (joined or isinstance(error, workers.Stopped)):
                raise
            record()
            raise
        if failures:
            record()
        else:
            reproduce(None, declared)
    if failures:
        raise FailedCellsError(_in_lines(failures))


def _in_lines(failures: dict[str, str]) -> str:
    return "\n".join(f"{stage}: {reason}" for stage, reason in failures.items())


@contextmanager
def _noted(failures: dict[str, str]) -> Iterator[None]:
    """What ends the run before its failures are raised is given a note of them."""
    try:
        yield
    except (KeyboardInterrupt, ValueError, OSError) as error:
        if failures:
            error.add_note(_in_lines(failures))
        raise


def assign(devices: list[torch.device], jobs: int | None) -> list[torch.device]:
    """The device of each of `jobs` processes: round robin, by default one a core or one a GPU."""
    count = jobs or (available() if devices[0].type == "cpu" else len(devices))
    return [devices[i % len(devices)] for i in range(count)]


def stale_cells() -> list[StageCell]:
    """The train stages that `dvc repro` would run, in its order: changed, and not to be had from DVC's cache.

    Raises ValueError where params.yaml is edited meanwhile.
    """
    stale = []
    text = Path("params.yaml").read_bytes()
    study = load_study()
    repo = Repo()
    with repo.lock, parse_params_once():
        for stage in repo.index.stages:
            words = shlex.split(stage.cmd) if isinstance(stage.cmd, str) else []
            if words[:4] != ["python", "-m", "pipeline", "train"] or not stage.changed():
                continue
            if not is_restorable(repo, stage):
                task, variant = words[4:]
                section, model = study.tasks[task], study.variants[variant]
                setting = CellSetting(model, study.optimizer, section.training, study.seeds, study.precision)
                stale.append(StageCell(stage.addressing, Cell.of(task, variant, setting), declared_dependencies(stage)))
    if Path("params.yaml").read_bytes() != text:
        raise ValueError("params.yaml was changed while it was read; run it again")
    return stale


def train(
    stale: list[StageCell], devices: list[torch.device], joined: Cluster | None = None
) -> Iterator[tuple[StageCell, str | None]]:
    """Trains the cells: each once its folder is written, and each that failed with the reason and where its log is."""
    order = sorted(stale, key=_cost, reverse=True)
    device = joined.device if joined else lambda task: devices[0]
    jobs = [(stage, group) for stage in order for group in group_jobs(stage.cell, device(stage.cell.task))]
    outcomes: dict[str, dict[Job, Trained]] = {stage.stage: {} for stage in stale}
    began: dict[str, float] = {}
    origin = provenance()
    work = (
        partial(joined.work, tasks=[stage.cell.task for stage, _ in jobs])
        if joined
        else partial(workers.run_jobs, devices=devices, method=_method())
    )
    runs = [(stage.cell, group) for stage, group in jobs]
    with Progress([stage.cell for stage in stale], joined.size if joined else len(devices)) as progress:
        for index, outcome in work(_run, runs, report=lambda index, message: progress.advance(jobs[index][0].cell, *message)):
            stage, group = jobs[index]
            name, cell = stage.stage, stage.cell
            if isinstance(outcome, workers.Failure):
                progress.fail(cell)
                yield stage, _log_failure(cell, group, outcome)
                continue
            seconds, trained = outcome
            began[name] = min(began.get(name, math.inf), time.monotonic() - seconds)
            outcomes[name] |= zip(group, trained, strict=True)
            if len(outcomes[name]) == len(cell.jobs):
                took = time.monotonic() - began[name]
                outcomes_of_cell = name_devices([outcomes[name].pop(job) for job in cell.jobs])
                write(cell, outcomes_of_cell, began=time.time() - took, origin=origin)
                _error_log(cell).unlink(missing_ok=True)
                progress.end(cell, took, rows_of_chosen(outcomes_of_cell, cell.meta.goal))
                yield stage, None


def _run(
    cell_and_jobs: tuple[Cell, tuple[Job, ...]], device: torch.device, report: workers.Report
) -> tuple[float, list[Trained]]:
    start = time.perf_counter()
    trained = train_jobs(*cell_and_jobs, device, report)
    return time.perf_counter() - start, trained


def rows_of_chosen(outcomes: list[Trained], goal: str) -> list[ValidationRecord]:
    """The last look at each run of the learning rate that is chosen, but of those that diverged."""
    chosen = choose_learning_rate(outcomes, goal)
    return [o.history[-1] for o in outcomes if o.job.learning_rate == chosen and not o.diverged]


def name_devices(trained: list[Trained]) -> list[Trained]:
    """The runs of a cell, each naming every kind of device that any of them was made on: machines of a cluster may differ."""
    kinds = " and ".join(sorted({run.device for run in trained}))
    return [run._replace(device=kinds) for run in trained]


def _method() -> str:
    """Processes are forked from one that has torch imported and has done nothing else, so that no thread and no GPU is copied."""
    if sys.platform == "win32":
        return "spawn"
    multiprocessing.set_forkserver_preload(["pipeline.stages.train"])
    # Ctrl-C in a terminal is for it as well, and what it makes of that is a traceback.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        forkserver.ensure_running()
    finally:
        signal.signal(signal.SIGINT, before)
    return "forkserver"


def _cost(stage: StageCell) -> int:
    """Tokens of a run: the longest first, so that none is left to run alone at the end."""
    schedule, length = stage.cell.setting.training, stage.cell.meta.length
    return schedule.steps * schedule.batch * length


def _log_failure(cell: Cell, jobs: tuple[Job, ...], failure: workers.Failure) -> str:
    which = "; ".join(f"learning rate {job.learning_rate:g}, seed {job.seed}" for job in jobs)
    with atomic_write(_error_log(cell)) as path:
        path.write_text(f"{cell.task} {cell.variant}, {which}\n\n{failure.trace}\n")
    first = next(iter(str(failure.error).splitlines()), "") or type(failure.error).__name__
    return f"{first} (see {_error_log(cell)})"


def _error_log(cell: Cell) -> Path:
    return LOGS / cell.task / f"{cell.variant}.error.txt"
