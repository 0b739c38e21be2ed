"""Where the work is done: the device, and jobs spread over processes of one thread each.

A job computes with one thread whatever `threads` is, since the number of threads changes the order of additions and with it
the last bits. `threads` is how many jobs run at a time, so that every number of them gives the same bits.
"""

from __future__ import annotations

import contextlib
import copy
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import connection
from typing import Any, Literal, NamedTuple, TypeVar

import torch

from pipeline.runtime.determinism import apply_determinism
from pipeline.runtime.processes import available, end_with_parent, keep_memory

LOOK = 0.5
"""Seconds after which it is noticed, where nothing else happens, that this process is asked to stop."""
Report = Callable[[Any], None]
Job = TypeVar("Job")
Result = TypeVar("Result")


class Stopped(KeyboardInterrupt):
    """Every job has kept what it has done."""


_stopping = False


def stopping() -> bool:
    """Whether a job is to keep what it has, and raise Stopped."""
    return _stopping


def _stop(*signal_and_frame: Any) -> None:
    global _stopping
    _stopping = True


@contextmanager
def stoppable() -> Iterator[None]:
    """Ctrl-C makes the jobs of the block come to a stop; the second is a KeyboardInterrupt at once, as outside the block."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*signal_and_frame: Any) -> None:
        _stop()
        signal.signal(signal.SIGINT, before)
        os.write(2, b"\nkeeping what is done; Ctrl-C again ends at once\n")

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        global _stopping
        _stopping = False
        signal.signal(signal.SIGINT, before)


class Failure(NamedTuple):
    """A job without a result."""

    error: BaseException
    trace: str
    """The traceback, as Python prints it."""


def prepare() -> None:
    """Makes this process ready for jobs."""
    torch.set_num_threads(1)
    apply_determinism()
    keep_memory()


def parallel_map(
    function: Callable[[Job, torch.device, Report], Result],
    jobs: Sequence[Job],
    *,
    device: torch.device,
    parallel_runs: int | Literal["auto"],
    report: Report = lambda message: None,
) -> list[Result]:
    """`function(job, device, report)` of every job, in the order of `jobs`; reports are passed on to `report` as they come.

    On a CPU the jobs run side by side in processes, on a GPU one after the other in this one. Raises what a job raises.
    """
    prepare()
    count = _processes(len(jobs), parallel_runs)
    if device.type != "cpu" or count == 1:
        return [function(job, device, report) for job in jobs]
    results: dict[int, Result] = {}
    # Forked processes start in milliseconds, with torch imported; where there is no fork they import it again.
    method = "fork" if sys.platform == "linux" else "spawn"
    for index, outcome in run_jobs(function, jobs, devices=[device] * count, method=method, report=lambda _, told: report(told)):
        if isinstance(outcome, Failure):
            raise outcome.error
        results[index] = outcome
    return [results[index] for index in range(len(jobs))]


def run_jobs(
    function: Callable[[Job, torch.device, Report], Result],
    jobs: Sequence[Job],
    *,
    devices: Sequence[torch.device],
    method: str,
    report: Callable[[int, Any], None],
) -> Iterator[tuple[int, Result | Failure]]:
    """Index and outcome of each job as it ends. A process for each of `devices` takes one job after the other.

    A job that raises, or whose process is killed, fails alone. `report` is told the index of the job that reports, and what.
    The processes end with this one, however it ends. Raises Stopped where it is `stopping`, once they have.
    """
    context = multiprocessing.get_context(method)
    waiting = list(range(len(jobs)))[::-1]
    workers = [_Worker(context, function, device) for device in devices[: len(jobs)]]
    try:
        for worker in workers:
            worker.begin(waiting.pop(), jobs)
        while busy := [worker for worker in workers if worker.job is not None]:
            if stopping():
                waiting.clear()
                for worker in busy:
                    worker.stop()
            ready = connection.wait([worker.pipe for worker in busy], timeout=LOOK)
            for place, worker in enumerate(workers):
                if worker.pipe not in ready or (job := worker.job) is None:
                    continue
                try:
                    kind, content = worker.pipe.recv()
                except (EOFError, OSError):
                    kind, content = "done", worker.death()
                    worker = workers[place] = _Worker(context, function, worker.device)
                if kind == "report":
                    report(job, content)
                    continue
                worker.job = None
                if waiting:
                    worker.begin(waiting.pop(), jobs)
                if not (isinstance(content, Failure) and stopping()):
                    yield job, content
        if stopping():
            raise Stopped
    finally:
        for worker in workers:
            worker.process.kill()
            worker.process.join()


class _Worker:
    """A process that takes jobs from its end of a pipe, and what this process knows of it."""

    def __init__(self, context: Any, function: Callable[..., Any], device: torch.device):
        self.device = device
        self.job: int | None = None
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, function, device), daemon=True)
        self.process.start()
        other.close()  # or the end of the process would not be the end of the pipe

    def begin(self, index: int, jobs: Sequence[Any]) -> None:
        self.job = index
        # A process that is gone is found out by the next look at the pipe.
        with contextlib.suppress(OSError):
            self.pipe.send(jobs[index])

    def stop(self) -> None:
        """As Ctrl-C does, which reaches the processes of a terminal all at once, but those of a `kill` do not."""
        if self.process.pid is not None and self.process.is_alive():
            os.kill(self.process.pid, signal.SIGINT)

    def death(self) -> Failure:
        self.process.join()
        code = self.process.exitcode
        how = f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
        words = f"its process ended by {how}" + (", as when memory runs out" if code == -signal.SIGKILL else "")
        return Failure(ChildProcessError(words), words)


def _serve(pipe: Any, function: Callable[..., Any], device: torch.device) -> None:
    prepare()
    signal.signal(signal.SIGINT, _stop)  # the process that gave the jobs decides what else becomes of them
    end_with_parent()
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        try:
            outcome = function(job, device, lambda message: pipe.send(("report", message)))
        except (Exception, Stopped) as error:
            outcome = Failure(_portable(error), traceback.format_exc())
        pipe.send(("done", outcome))


def _portable(error: BaseException) -> BaseException:
    """The error, or its words where it would not get through a pipe."""
    try:
        copy.copy(error)  # makes it anew in the way in which the other end of the pipe does
    except Exception:  # whatever its class does when it is made again
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _processes(jobs: int, parallel_runs: int | Literal["auto"]) -> int:
    """As many processes as are asked for. Of as many as there are cores, half as many more where that ends the jobs together."""
    if parallel_runs != "auto":
        return min(jobs, parallel_runs)
    cores = available()
    return jobs if jobs <= cores + cores // 2 else cores
