"""Train many cells in parallel worker processes, then record them in DVC.

    plan, generate     DVC reproduces the stages before training
    train              all runs of all stale cells are trained in parallel; a cell is written when its last run ends
    other stages       DVC reproduces everything; train stages that are already trained are recorded instead of run

The result, including dvc.lock, is the same as that of `dvc repro`. A cell is recorded only if the dependencies of its stage are
the same as when its training began. DVC's lock is not held while cells are trained.
"""

from __future__ import annotations

import math
import multiprocessing
import signal
import sys
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cat.training.fit import ValidationRecord
from pipeline.config.grid import check_cell
from pipeline.config.load import load_study
from pipeline.runtime import workers
from pipeline.runtime.devices import resolve_devices
from pipeline.runtime.processes import available, short_tmpdir
from pipeline.scheduling import ray_cluster
from pipeline.scheduling.dvc_internals import (
    exclusive_run,
    name_user,
    readable_dvc_errors,
    repair_rwlock,
    reproduce,
    stale_stages,
)
from pipeline.scheduling.progress import Progress
from pipeline.scheduling.ray_cluster import Cluster
from pipeline.stages.live import STUDY_DELAY, LiveFiles
from pipeline.stages.plan import check_planned
from pipeline.stages.train import Cell, CellSetting, Job, Message, Trained, choose_learning_rate, group_jobs, train_jobs, write
from pipeline.storage.files import atomic_write
from pipeline.storage.leftovers import set_aside
from pipeline.storage.paths import LOGS
from pipeline.storage.provenance import provenance

FIRST = ("plan", "generate")
"""Stages before training."""
TRAIN_COMMAND = ["python", "-m", "pipeline", "train"]
RECORD_INTERVAL = 300
"""Seconds between recording trained cells, so that at most this much is lost if this process is killed."""
RECORD_RATIO = 10
"""The interval is at least this many times the duration of the last recording, which takes minutes for thousands of cells."""

SOCKET_TMPDIR = 70
"""Longest folder of the server's socket, in bytes: the path of a socket has at most 103, and its name in the folder has 32."""


class StageCell(NamedTuple):
    """A train stage, its cell, and its dependencies when training began."""

    stage: str
    cell: Cell
    declared: dict[str, Any]


class FailedCellsError(Exception):
    """Raised if cells failed; the message has one line per cell with the reason and the path of its log."""


def run(*, jobs: int | None = None, ray: str | None = None, only: Collection[tuple[str, str]] = ()) -> None:
    """Reproduce the study with `jobs` runs at a time; by default one per core or GPU.

    Cells are trained in local processes or on the Ray cluster at the address `ray`. If `only` names cells, no others are trained,
    and no stages after training run.

    Raises FailedCellsError if cells failed, after the other cells are trained and recorded. Raises ValueError if a stage fails,
    the cluster is unreachable or lost, or another call runs in this folder. Raises KeyboardInterrupt on Ctrl-C, after running
    cells are saved and trained cells are recorded. Notes of the last two name the cells that failed before.
    """
    study = load_study()
    devices = assign(resolve_devices(study.device), jobs)
    failures: dict[str, str] = {}
    with (
        _add_notes(failures),
        exclusive_run(),
        readable_dvc_errors(),
        ray_cluster.join(ray, study, jobs) if ray else nullcontext() as joined,
    ):
        name_user()
        repair_rwlock()
        for line in set_aside(study):  # also if `plan` has not changed
            print(line)
        reproduce(("plan", *(f"generate@{task}" for task, _ in only)) if only else FIRST)
        stale = stale_cells(only)
        declared: dict[str, dict[str, Any]] = {}

        def record() -> None:
            if declared:
                reproduce(declared, declared)
                declared.clear()

        last_record, interval = time.monotonic(), float(RECORD_INTERVAL)
        try:
            # Jobs on a cluster are cancelled and cannot save their state.
            with nullcontext() if joined else workers.stoppable():
                for stage, failure in train(stale, devices, joined, study.live):
                    if failure is not None:
                        failures[stage.stage] = failure
                        continue
                    declared[stage.stage] = stage.declared
                    if (began := time.monotonic()) - last_record > interval:
                        record()
                        last_record = time.monotonic()
                        interval = max(RECORD_INTERVAL, RECORD_RATIO * (last_record - began))
        except (KeyboardInterrupt, ValueError) as error:
            if not (joined or isinstance(error, workers.Stopped)):
                raise
            record()
            raise
        if failures or only:
            record()
        else:
            reproduce(None, declared)
    if failures:
        raise FailedCellsError(_format_failures(failures))


def _format_failures(failures: dict[str, str]) -> str:
    return "\n".join(f"{stage}: {reason}" for stage, reason in failures.items())


@contextmanager
def _add_notes(failures: dict[str, str]) -> Iterator[None]:
    """Add the failures so far as a note to an error that ends the run."""
    try:
        yield
    except (KeyboardInterrupt, ValueError, OSError) as error:
        if failures:
            error.add_note(_format_failures(failures))
        raise


def assign(devices: list[torch.device], jobs: int | None) -> list[torch.device]:
    """Return the device of each of `jobs` processes, round robin; by default one process per core or GPU."""
    count = jobs or (available() if devices[0].type == "cpu" else len(devices))
    return [devices[i % len(devices)] for i in range(count)]


def stale_cells(only: Collection[tuple[str, str]] = ()) -> list[StageCell]:
    """Return the train stages that `dvc repro` would run, in its order; only for the cells in `only`, if it has any.

    These are changed stages that DVC's cache cannot restore. Raises ValueError if params.yaml changed a cell since `plan` ran.
    """
    stale = []
    study = load_study()
    for stage in stale_stages(TRAIN_COMMAND):
        task, variant = stage.command[len(TRAIN_COMMAND) :]
        if only and (task, variant) not in only:
            continue
        check_cell(study, task, variant)
        check_planned(study, task, variant)
        cell = Cell.of(task, variant, CellSetting.of(study, task, variant))
        stale.append(StageCell(stage.name, cell, stage.dependencies))
    return stale


def train(
    stale: list[StageCell], devices: list[torch.device], joined: Cluster | None = None, live: bool = False
) -> Iterator[tuple[StageCell, str | None]]:
    """Train the cells and yield each when it is written, or with an error message if it failed.

    With `live`, their progress is written to files and shown in MLflow.
    """
    if not stale:
        return  # before the server of the worker processes is started, which imports torch
    order = sorted(stale, key=_cost, reverse=True)
    device = joined.device if joined else lambda task: devices[0]
    jobs = [(stage, group) for stage in order for group in group_jobs(stage.cell, device(stage.cell.task))]
    outcomes: dict[str, dict[Job, Trained]] = {stage.stage: {} for stage in stale}
    start_times: dict[str, float] = {}
    origin = provenance()
    run_jobs = (
        partial(joined.run_jobs, tasks=[stage.cell.task for stage, _ in jobs])
        if joined
        else partial(workers.run_jobs, devices=devices, method=_method())
    )
    runs = [(stage.cell, group) for stage, group in jobs]
    with (
        Progress([stage.cell for stage in stale], joined.size if joined else len(devices)) as progress,
        LiveFiles(enabled=live, delay=STUDY_DELAY) as files,
    ):

        def report(index: int, message: Message) -> None:
            cell = jobs[index][0].cell
            progress.advance(cell, *message)
            files.advance(cell, message[1])

        for index, outcome in run_jobs(_run, runs, report=report):
            stage, group = jobs[index]
            name, cell = stage.stage, stage.cell
            if isinstance(outcome, workers.Failure):
                progress.fail(cell)
                files.end(cell, "failed")
                yield stage, _log_failure(cell, group, outcome)
                continue
            seconds, trained = outcome
            start_times[name] = min(start_times.get(name, math.inf), time.monotonic() - seconds)
            outcomes[name] |= zip(group, trained, strict=True)
            for one in trained:
                progress.end_run(cell, one)
            if len(outcomes[name]) == len(cell.jobs):
                duration = time.monotonic() - start_times[name]
                results = name_devices([outcomes[name].pop(job) for job in cell.jobs])
                write(cell, results, began=time.time() - duration, origin=origin)
                files.end(cell, "trained")
                _error_log(cell).unlink(missing_ok=True)
                progress.end(cell, duration, last_records(results, cell.meta.goal))
                yield stage, None


def _run(
    cell_and_jobs: tuple[Cell, tuple[Job, ...]], device: torch.device, report: workers.Report
) -> tuple[float, list[Trained]]:
    start = time.perf_counter()
    trained = train_jobs(*cell_and_jobs, device, report)
    return time.perf_counter() - start, trained


def last_records(outcomes: list[Trained], goal: str) -> list[ValidationRecord]:
    """Return the last validation record of each run at the chosen learning rate that did not diverge."""
    chosen = choose_learning_rate(outcomes, goal)
    return [o.history[-1] for o in outcomes if o.job.learning_rate == chosen and not o.diverged]


def name_devices(trained: list[Trained]) -> list[Trained]:
    """Set the device of each run to all device kinds of the cell, since the machines of a cluster may differ."""
    devices = " and ".join(sorted({run.device for run in trained}))
    return [run._replace(device=devices) for run in trained]


def _method() -> str:
    """Return "forkserver", or "spawn" on Windows.

    The server only imports torch, so that forked processes start quickly but inherit no thread and no GPU state. It needs a
    socket; "spawn" is the choice without one, such as on a file system that has no sockets.
    """
    if sys.platform == "win32":
        return "spawn"
    multiprocessing.set_forkserver_preload(["pipeline.stages.train"])
    # The server inherits this: otherwise Ctrl-C in a terminal would make it print a traceback.
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with short_tmpdir(SOCKET_TMPDIR):
            forkserver.ensure_running()
    except OSError:
        return "spawn"
    finally:
        signal.signal(signal.SIGINT, previous)
    return "forkserver"


def _cost(stage: StageCell) -> float:
    """Return the tokens per run. The longest runs start first, so that none runs alone at the end."""
    training = stage.cell.setting.training
    return training.steps * training.batch * stage.cell.meta.mean_length


def _log_failure(cell: Cell, jobs: tuple[Job, ...], failure: workers.Failure) -> str:
    runs = "; ".join(f"learning rate {job.learning_rate:g}, seed {job.seed}" for job in jobs)
    with atomic_write(_error_log(cell)) as path:
        path.write_text(f"{cell.task} {cell.variant}, {runs}\n\n{failure.trace}\n")
    first = next(iter(str(failure.error).splitlines()), "") or type(failure.error).__name__
    return f"{first} (see {_error_log(cell)})"


def _error_log(cell: Cell) -> Path:
    return LOGS / cell.task / f"{cell.variant}.error.txt"
