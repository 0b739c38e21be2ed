"""Where the work is done: the device, and jobs spread over processes of one thread each.

A job computes with one thread whatever `threads` is, since the number of threads changes the order of additions and with it
the last bits. `threads` is how many jobs run at a time, so that every number of them gives the same bits.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, Literal, TypeVar

import torch

from pipeline.params import ParamsError

Report = Callable[[Any], None]
Job = TypeVar("Job")
Result = TypeVar("Result")


def resolve_device(name: str) -> torch.device:
    """The device that `name` (auto, cpu, cuda, cuda:N) stands for here. Raises ParamsError where there is none."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ParamsError([f"params.yaml: device = {name}: there is no such GPU here; use auto or cpu"])
    return device


def describe(device: torch.device) -> str:
    """What results depend on: the kind of GPU, or the instruction set that PyTorch uses on this CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({torch.backends.cpu.get_cpu_capability()})"


def spread(
    function: Callable[[Job, Report], Result],
    jobs: Sequence[Job],
    *,
    device: torch.device,
    threads: int | Literal["auto"],
    report: Report = lambda message: None,
) -> list[Result]:
    """`function` of every job, in the order of `jobs`; what the jobs report is passed on to `report` as it comes.

    On a CPU the jobs run in forked processes, on a GPU one after the other in this one.
    """
    torch.set_num_threads(1)
    workers = _workers(len(jobs), threads)
    if device.type != "cpu" or workers == 1:
        return [function(job, report) for job in jobs]
    # Forked workers start in milliseconds, with torch imported; where there is no fork they import it again.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    messages: Any = context.SimpleQueue()
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(messages,)) as pool:
        futures = [pool.submit(_work, function, job) for job in jobs]
        listener = threading.Thread(target=_listen, args=(messages, report))
        listener.start()
        try:
            return [future.result() for future in futures]
        finally:
            messages.put(None)
            listener.join()


def _workers(jobs: int, threads: int | Literal["auto"]) -> int:
    """As many processes as threads, or a few more where that ends the jobs together: 3 jobs on 2 threads take 3 processes."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = available if threads == "auto" else threads
    if threads == 1 or jobs <= threads:
        return min(jobs, threads)
    rounds = jobs // threads
    return -(-jobs // rounds)


_messages: Any = None


def _start(messages: Any) -> None:
    global _messages
    _messages = messages
    torch.set_num_threads(1)


def _work(function: Callable[[Job, Report], Result], job: Job) -> Result:
    return function(job, _messages.put)


def _listen(messages: Any, report: Report) -> None:
    while (message := messages.get()) is not None:
        report(message)
