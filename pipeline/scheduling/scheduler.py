"""Many cells at a time: what `dvc repro` would train one after the other is trained in warm processes, then given to DVC.

    plan, generate     DVC reproduces what comes before training
    train              stale cells, all their runs side by side; a folder of runs/ is written when the last run of a cell ends
    the rest           DVC reproduces everything; a train stage whose outcome is there is recorded instead of run

The outcome, dvc.lock too, is that of `dvc repro`. A cell is recorded only if everything that its stage declares is still as it
was when its training began. DVC's lock is not held while cells are trained. This is the only module that knows DVC from inside.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import shlex
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from copy import deepcopy
from functools import partial, reduce
from multiprocessing import forkserver
from operator import getitem
from pathlib import Path
from typing import Any, NamedTuple

import torch
from dvc.dependency import param
from dvc.dvcfile import PROJECT_FILE
from dvc.exceptions import DvcException, PrettyDvcException
from dvc.repo import Repo, lock_repo
from dvc.repo.reproduce import _reproduce, get_active_graph, plan_repro
from dvc.stage import PipelineStage, Stage
from filelock import FileLock, Timeout

from cat.training.fit import Row
from pipeline.config.study import load_study
from pipeline.runtime import workers
from pipeline.runtime.processes import available
from pipeline.scheduling import ray_cluster
from pipeline.scheduling.progress import Progress
from pipeline.scheduling.ray_cluster import Cluster
from pipeline.stages.train import Cell, Job, Setting, Trained, choose, groups, run_jobs, write
from pipeline.storage.files import LOGS, whole
from pipeline.storage.provenance import provenance

FIRST = ("plan", "generate")
LOCK, RWLOCK = Path(".dvc/tmp/pipeline.lock"), Path(".dvc/tmp/rwlock")
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
    devices = assign(workers.resolve_devices(study.device), jobs)
    failures: dict[str, str] = {}
    with _noted(failures), _alone(), _readable_errors(), ray_cluster.join(ray, study, jobs) if ray else nullcontext() as joined:
        _mend()
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
    with repo.lock, _params_read_once():
        for stage in repo.index.stages:
            words = shlex.split(stage.cmd) if isinstance(stage.cmd, str) else []
            if words[:4] != ["python", "-m", "pipeline", "train"] or not stage.changed():
                continue
            if not _restorable(repo, stage):
                task, variant = words[4:]
                section, model = study.tasks[task], study.variants[variant]
                setting = Setting(model, study.train, section.train, study.seeds, study.precision)
                stale.append(StageCell(stage.addressing, Cell.of(task, variant, setting), _declared(stage)))
    if Path("params.yaml").read_bytes() != text:
        raise ValueError("params.yaml was changed while it was read; run it again")
    return stale


def train(
    stale: list[StageCell], devices: list[torch.device], joined: Cluster | None = None
) -> Iterator[tuple[StageCell, str | None]]:
    """Trains the cells: each once its folder is written, and each that failed with the reason and where its log is."""
    order = sorted(stale, key=_cost, reverse=True)
    device = joined.device if joined else lambda task: devices[0]
    jobs = [(stage, group) for stage in order for group in groups(stage.cell, device(stage.cell.task))]
    outcomes: dict[str, dict[Job, Trained]] = {stage.stage: {} for stage in stale}
    began: dict[str, float] = {}
    origin = provenance()
    work = (
        partial(joined.work, tasks=[stage.cell.task for stage, _ in jobs])
        if joined
        else partial(workers.work, devices=devices, method=_method())
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
                outcomes_of_cell = _alike([outcomes[name].pop(job) for job in cell.jobs])
                write(cell, outcomes_of_cell, began=time.time() - took, origin=origin)
                _error_log(cell).unlink(missing_ok=True)
                progress.end(cell, took, rows_of_chosen(outcomes_of_cell, cell.meta.goal))
                yield stage, None


def _run(
    cell_and_jobs: tuple[Cell, tuple[Job, ...]], device: torch.device, report: workers.Report
) -> tuple[float, list[Trained]]:
    start = time.perf_counter()
    trained = run_jobs(*cell_and_jobs, device, report)
    return time.perf_counter() - start, trained


def rows_of_chosen(outcomes: list[Trained], goal: str) -> list[Row]:
    """The last look at each run of the learning rate that is chosen, but of those that diverged."""
    chosen = choose(outcomes, goal)
    return [o.history[-1] for o in outcomes if o.job.learning_rate == chosen and not o.diverged]


def _alike(trained: list[Trained]) -> list[Trained]:
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
    schedule, length = stage.cell.setting.schedule, stage.cell.meta.length
    return schedule.steps * schedule.batch * length


def _log_failure(cell: Cell, jobs: tuple[Job, ...], failure: workers.Failure) -> str:
    which = "; ".join(f"learning rate {job.learning_rate:g}, seed {job.seed}" for job in jobs)
    with whole(_error_log(cell)) as path:
        path.write_text(f"{cell.task} {cell.variant}, {which}\n\n{failure.trace}\n")
    first = next(iter(str(failure.error).splitlines()), "") or type(failure.error).__name__
    return f"{first} (see {_error_log(cell)})"


def _error_log(cell: Cell) -> Path:
    return LOGS / cell.task / f"{cell.variant}.error.txt"


def reproduce(targets: Any, trained: dict[str, dict[str, Any]] | None = None) -> None:
    """`dvc repro` of `targets`, of everything for None, but for the stages `trained`: recorded if what they declare is as given.

    Where both are given nothing is run: what is not as given is left as it is. DVC writes the whole lock file after every stage;
    here it is written once, when all are done or one has failed. Raises ValueError where dvc.yaml has none of them.
    """
    trained = trained or {}
    done: list[PipelineStage] = []

    def record(stage: PipelineStage) -> bool:
        given = stage.addressing in trained and _declared(stage) == trained[stage.addressing]
        if given:
            stage.save()
            stage.commit()
            done.append(stage)
        return given

    def record_or_run(stage: PipelineStage, **options: Any) -> PipelineStage | None:
        if not record(stage):
            if not stage.changed(False, options["upstream"]) or stage.reproduce(**options) is None:
                return None
            done.append(stage)
        return stage

    # What has been trained is worth waiting for another command of DVC's.
    repo = Repo(_wait_for_lock=bool(trained))
    with _params_read_once(), lock_repo(repo), repo.scm_context():
        try:
            # Not as targets of DVC, which reads dvc.yaml and dvc.lock anew for each.
            stages = _named(repo, targets)
            if trained and targets:
                for stage in stages:
                    record(stage)
            elif not stages:
                raise ValueError(f"{PROJECT_FILE} has no stages of a study in this folder")
            else:
                graph = get_active_graph(repo.index.graph)
                _reproduce(plan_repro(graph, stages), graph=graph, repro_fn=record_or_run)
        finally:
            if done:
                done[0].dvcfile.dump_stages(done, update_pipeline=False)


def _named(repo: Repo, targets: Iterable[str] | None) -> list[Stage]:
    """The stages of dvc.yaml that are named, or of which the group is; all for None."""
    ours = [stage for stage in repo.index.stages if stage.path_in_repo == PROJECT_FILE]
    if targets is None:
        return ours
    wanted = set(targets)
    return [stage for stage in ours if wanted & {stage.addressing, stage.addressing.partition("@")[0]}]


def _restorable(repo: Repo, stage: PipelineStage) -> bool:
    """Whether DVC has the outcome of the stage as it is now, from this or from an earlier run of it."""
    if not (stage.changed_stage() or stage.changed_deps()):
        return stage.outs_cached()
    stage.save_deps()
    entry = repo.stage_cache._load(stage)
    return entry is not None and repo.stage_cache._create_stage(entry, wdir=stage.wdir).outs_cached()


def _declared(stage: PipelineStage) -> dict[str, Any]:
    """The command, and the digest or the values of every dependency as it is now."""
    stage.save_deps()
    return {"cmd": stage.cmd, **{str(dep): dep.hash_info.value for dep in stage.deps}}


@contextmanager
def _params_read_once() -> Iterator[None]:
    """DVC parses params.yaml for every stage, and goes through all of it for every key: the square of the number of cells.

    Here it is parsed anew only when it has changed, and a key is looked up.
    """
    read_param_file = param.read_param_file
    parsed: dict[tuple[Any, ...], Any] = {}

    def look_up(fs: Any, path: str, keys: list[str] | None = None, flatten: bool = False, **options: Any) -> Any:
        if not (keys and flatten):
            return read_param_file(fs, path, keys, flatten, **options)
        about = Path(path).stat()
        state = (path, about.st_mtime_ns, about.st_size, about.st_ino)
        if state not in parsed:
            parsed.clear()
            parsed[state] = read_param_file(fs, path, **options)
        values = {}
        for key in keys:
            # What is not there is left out, as DVC does.
            with suppress(KeyError, TypeError):
                # A copy: what two stages share would be written as an alias into the lock.
                values[key] = deepcopy(reduce(getitem, key.split("."), parsed[state]))
        return values

    param.read_param_file = look_up
    try:
        yield
    finally:
        param.read_param_file = read_param_file


@contextmanager
def _alone() -> Iterator[None]:
    LOCK.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(LOCK, timeout=0):
            yield
    except Timeout:
        raise ValueError("another `python -m pipeline run` is at work in this folder; wait for it, or end it") from None


def _mend() -> None:
    """DVC writes in place what it is reading and writing: killed in that moment, it leaves what no later one can read."""
    with suppress(FileNotFoundError):
        try:
            json.loads(RWLOCK.read_text(encoding="utf-8"))
        except ValueError:
            RWLOCK.unlink()


@contextmanager
def _readable_errors() -> Iterator[None]:
    try:
        yield
    except DvcException as error:
        causes: list[BaseException] = [error]
        while (cause := causes[-1].__cause__) is not None:
            causes.append(cause)
        if any(str(cause).endswith("exited with 130") for cause in causes):
            raise KeyboardInterrupt from None
        words = "; ".join(" ".join(str(cause).split()) for cause in causes)
        if any(isinstance(cause, PrettyDvcException) and "dvc.lock" in str(cause) for cause in causes):
            words += "; remove dvc.lock and run it again: what has been run is in DVC's cache"
        raise ValueError(words) from None
