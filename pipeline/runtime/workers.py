"""Run jobs in worker processes with one thread each.

A job always computes with one thread, because the number of threads changes the order of additions and with it the last bits.
`parallel_runs` sets how many jobs run at a time; results do not depend on it.

torch is imported only by processes that need it: figures are drawn by the same workers without it.
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
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import connection
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

from pipeline.runtime.determinism import apply_determinism
from pipeline.runtime.processes import available, end_with_parent, keep_memory

if TYPE_CHECKING:
    import torch

POLL_SECONDS = 0.5
"""Longest delay until a request to stop is noticed."""
Report = Callable[[Any], None]
Job = TypeVar("Job")
Device = TypeVar("Device")
Result = TypeVar("Result")


class Stopped(KeyboardInterrupt):
    """Raised on Ctrl-C after every job has saved its state."""


_stopping = False


def stopping() -> bool:
    """Return whether jobs must save their state and raise Stopped."""
    return _stopping


def _stop(*signal_and_frame: Any) -> None:
    global _stopping
    _stopping = True


@contextmanager
def stoppable() -> Iterator[None]:
    """Let the first Ctrl-C stop jobs after the current step; a second one raises KeyboardInterrupt at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*signal_and_frame: Any) -> None:
        _stop()
        signal.signal(signal.SIGINT, previous)
        os.write(2, b"\nStopping after this step and saving. Press Ctrl-C again to quit now.\n")

    previous = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        global _stopping
        _stopping = False
        signal.signal(signal.SIGINT, previous)


class Failure(NamedTuple):
    """The error of a job that failed."""

    error: BaseException
    trace: str
    """The traceback, as Python prints it."""


def prepare() -> None:
    """Set up this process for jobs that compute."""
    import torch

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
    """Return `function(job, device, report)` for each job, in the order of `jobs`.

    On a CPU jobs run in parallel processes, on a GPU one after the other in this process. `report` receives the messages of all
    jobs. Raises the first error of a job.
    """
    prepare()
    count = _processes(len(jobs), parallel_runs)
    if device.type != "cpu" or count == 1:
        return [function(job, device, report) for job in jobs]
    results: dict[int, Result] = {}
    outcomes = run_jobs(
        function, jobs, devices=[device] * count, method=start_method(), report=lambda index, message: report(message)
    )
    for index, outcome in outcomes:
        if isinstance(outcome, Failure):
            raise outcome.error
        results[index] = outcome
    return [results[index] for index in range(len(jobs))]


def start_method() -> str:
    """Return "fork" on Linux, which starts in milliseconds with all modules imported; elsewhere "spawn"."""
    return "fork" if sys.platform == "linux" else "spawn"


def run_jobs(
    function: Callable[[Job, Device, Report], Result],
    jobs: Sequence[Job],
    *,
    devices: Sequence[Device],
    method: str,
    report: Callable[[int, Any], None],
) -> Generator[tuple[int, Result | Failure], None, None]:
    """Yield index and outcome of each job as it ends. Each device has one process, which runs one job after the other.

    A device of None means that jobs need no torch. If a job raises or its process is killed, the other jobs continue. `report`
    receives the index of a job and its message. The processes end with this one, even if it is killed. Raises Stopped once all
    jobs have ended after a request to stop.
    """
    context = multiprocessing.get_context(method)
    waiting = list(range(len(jobs)))[::-1]
    workers = [_Worker(context, function, device) for device in devices[: len(jobs)]]
    try:
        for worker in workers:
            worker.start(waiting.pop(), jobs)
        while busy := [worker for worker in workers if worker.job is not None]:
            if stopping():
                waiting.clear()
                for worker in busy:
                    worker.stop()
            ready = connection.wait([worker.pipe for worker in busy], timeout=POLL_SECONDS)
            for place, worker in enumerate(workers):
                if worker.pipe not in ready or (job := worker.job) is None:
                    continue
                try:
                    kind, content = worker.pipe.recv()
                except (EOFError, OSError):
                    kind, content = "done", worker.exit_failure()
                    worker = workers[place] = _Worker(context, function, worker.device)
                if kind == "report":
                    report(job, content)
                    continue
                worker.job = None
                if waiting:
                    worker.start(waiting.pop(), jobs)
                if not (isinstance(content, Failure) and stopping()):
                    yield job, content
        if stopping():
            raise Stopped
    finally:
        for worker in workers:
            worker.process.kill()
            worker.process.join()


class _Worker:
    """A worker process, its pipe and the index of its current job."""

    def __init__(self, context: Any, function: Callable[..., Any], device: Any):
        self.device = device
        self.job: int | None = None
        self.pipe, child_pipe = context.Pipe()
        self.process = context.Process(target=_serve, args=(child_pipe, function, device), daemon=True)
        self.process.start()
        child_pipe.close()  # otherwise the pipe would stay open when the process ends

    def start(self, index: int, jobs: Sequence[Any]) -> None:
        self.job = index
        # If the process has ended, the next read from the pipe reports it.
        with contextlib.suppress(OSError):
            self.pipe.send(jobs[index])

    def stop(self) -> None:
        """Send SIGINT. Ctrl-C in a terminal reaches all processes, but a `kill` of the parent reaches only the parent."""
        if self.process.pid is not None and self.process.is_alive():
            os.kill(self.process.pid, signal.SIGINT)

    def exit_failure(self) -> Failure:
        self.process.join()
        code = self.process.exitcode
        how = f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
        message = f"the process ended with {how}" + (", possibly out of memory" if code == -signal.SIGKILL else "")
        return Failure(ChildProcessError(message), message)


def _serve(pipe: Any, function: Callable[..., Any], device: Any) -> None:
    if device is not None:
        prepare()
    signal.signal(signal.SIGINT, _stop)  # the parent process decides what happens next
    end_with_parent()
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        try:
            outcome = function(job, device, lambda message: pipe.send(("report", message)))
        except (Exception, Stopped) as error:
            outcome = Failure(_picklable(error), traceback.format_exc())
        pipe.send(("done", outcome))


def _picklable(error: BaseException) -> BaseException:
    """Return the error, or a RuntimeError with its message if it cannot be pickled."""
    try:
        copy.copy(error)  # rebuilds the error as unpickling at the other end of the pipe does
    except Exception:  # the constructor of the error class may raise anything
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _processes(jobs: int, parallel_runs: int | Literal["auto"]) -> int:
    """Return the number of processes: `parallel_runs`, or for "auto" one per core.

    If "auto" and the jobs exceed the cores by at most half, every job gets a process, so that all end at about the same time.
    """
    if parallel_runs != "auto":
        return min(jobs, parallel_runs)
    cores = available()
    return jobs if jobs <= cores + cores // 2 else cores
