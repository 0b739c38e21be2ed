"""Measure two implementations of the same work in turn: time in one process or in two, memory in a process each.

A case holds two setup functions. They are called again in the processes that measure memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import multiprocessing
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cat.training.cuda_graph import GraphedFunction
from pipeline.runtime.processes import keep_memory

REPEATS = 5
"""Measurements of each implementation, in turn."""
MIN_SECONDS = 0.1
"""Shortest measurement. Faster work is called several times per measurement."""
TOLERANCE = 1e-3
"""Largest difference of two results, relative to their largest absolute value."""

Work = Callable[[], Any]
Setup = Callable[[str], Work]
"""Prepares the work on a device (cpu or cuda). Must be a top-level function or a partial of one, because it is pickled."""
Agree = Callable[[Any, Any], None]


class Place(NamedTuple):
    """Device and number of threads of a measurement."""

    device: str
    threads: int


class Unit(NamedTuple):
    """How a figure is computed from the seconds of both sides."""

    name: str
    of: Callable[[float, float], float]
    more_is_better: bool = False


SPEEDUP = Unit("times as fast", lambda ours, other: other / ours, more_is_better=True)
COST = Unit("times the time", lambda ours, other: ours / other)
POWER = Unit("power of the length", lambda ours, other: math.log2(ours / other))
"""The exponent p of time ~ L^p; ours has twice the length of the other."""
SECONDS = Unit("seconds", lambda ours, other: ours)


@dataclass(frozen=True, kw_only=True)
class Side:
    """One implementation: seconds per call (median and range over the repeats), and peak bytes above those at rest."""

    name: str
    seconds: float
    fastest: float
    slowest: float
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Figure:
    """The result of a case. `low` and `high` are the range over the repeats."""

    case: str
    value: float
    low: float
    high: float
    unit: str
    target: float | None
    met: bool | None
    """None if there is no target."""
    ours: Side
    other: Side
    rate: str | None = None
    """Throughput of ours per second."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The compared quantity, its unit and its target."""

    name: str
    sides: tuple[str, str]
    """Names of ours and the other."""
    unit: Unit = SPEEDUP
    target: float | None = None
    count: tuple[int, str] | None = None
    """Work per call: number and unit."""


@dataclass(frozen=True, kw_only=True)
class Case(Comparison):
    """A comparison and the two implementations."""

    ours: Setup
    other: Setup
    agree: Agree | None = None
    """Raises AssertionError if two results differ; None: `same_numbers`."""
    own_process: bool = False
    """Whether the other runs in a process of its own on a CPU, where memory is allocated as in most programs."""
    replay: bool = False
    """Whether both are replayed as CUDA graphs on a GPU, like training steps (cuda_graph.py): without launch time on the CPU."""


class NotRun(Exception):  # noqa: N818  not an error
    """Says why a benchmark cannot run here."""


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A row of the suite: a description, a target, and the function that measures it."""

    what: str
    target: str
    figures: Callable[[Place], Iterator[Figure]]
    """Raises NotRun."""


def compared(cases: Callable[[str], Sequence[Case]]) -> Callable[[Place], Iterator[Figure]]:
    """Return a function that measures the cases of a device."""
    return lambda place: (compare(case, place) for case in cases(place.device))


def compare(case: Case, place: Place) -> Figure:
    """Check that both implementations agree, then measure them."""
    torch.set_num_threads(place.threads)
    keep_memory()  # as in training
    with contextlib.ExitStack() as stack:
        ours = _prepare(case.ours, case.replay, place.device)
        if case.own_process and place.device == "cpu":
            other: Work = stack.enter_context(OwnProcess(case.other, place))
        else:
            other = _prepare(case.other, case.replay, place.device)
        times = in_turn(ours, other, agree=case.agree or same_numbers, device=place.device)
        del ours, other
    return make_figure(case, *times, memory=(peak(case.ours, place), peak(case.other, place)))


def _prepare(setup: Setup, replay: bool, device: str) -> Work:
    work = setup(device)
    return GraphedFunction(work) if replay and device == "cuda" else work


def make_figure(comparison: Comparison, ours: Sequence[float], other: Sequence[float], *, memory: Sequence[int]) -> Figure:
    """Compute the figure from the seconds of each repeat and the peak memory of both sides."""
    unit, target = comparison.unit, comparison.target
    values = [unit.of(a, b) for a, b in zip(ours, other, strict=True)]
    value = median(values)
    first, second = (
        Side(name=name, seconds=median(times), fastest=min(times), slowest=max(times), bytes=size)
        for name, times, size in zip(comparison.sides, (ours, other), memory, strict=True)
    )
    return Figure(
        case=comparison.name,
        value=value,
        low=min(values),
        high=max(values),
        unit=unit.name,
        target=target,
        met=None if target is None else value >= target if unit.more_is_better else value <= target,
        ours=first,
        other=second,
        rate=f"{comparison.count[0] / first.seconds:,.0f} {comparison.count[1]}" if comparison.count else None,
    )


def in_turn(ours: Work, other: Work, *, agree: Agree, device: str) -> tuple[list[float], list[float]]:
    """Return the seconds per call of both, per repeat. Three calls of each warm up; their results must agree."""
    calls: list[int] = []
    for _ in range(3):
        results, calls = [], []
        for work in (ours, other):
            start = time.perf_counter()
            results.append(work())
            synchronize(device)
            calls.append(max(1, math.ceil(MIN_SECONDS / (time.perf_counter() - start))))
        agree(*results)
    del results
    repeats = [[seconds(work, n, device) for work, n in zip((ours, other), calls, strict=True)] for _ in range(REPEATS)]
    return [times[0] for times in repeats], [times[1] for times in repeats]


class OwnProcess:
    """Work in a process of its own, with the default settings of the memory allocator."""

    def __init__(self, setup: Setup, place: Place):
        self._pool = multiprocessing.get_context("spawn").Pool(1, _set_work, (setup, place))
        self._device = place.device

    def __enter__(self) -> OwnProcess:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.terminate()
        self._pool.join()

    def __call__(self) -> Any:
        return self._pool.apply(_call_work)

    def seconds(self, calls: int) -> float:
        """Return the seconds per call, measured in that process."""
        return self._pool.apply(_time_work, (calls, self._device))


_work: Work
"""The work of this process, if it is an `OwnProcess`."""


def _set_work(setup: Setup, place: Place) -> None:
    global _work
    torch.set_num_threads(place.threads)
    _work = setup(place.device)


def _call_work() -> Any:
    return _work()


def _time_work(calls: int, device: str) -> float:
    return seconds(_work, calls, device)


def seconds(work: Work, calls: int, device: str) -> float:
    """Return the seconds per call, the mean over `calls`, with garbage collection off."""
    if isinstance(work, OwnProcess):
        return work.seconds(calls)
    gc.disable()
    start = time.perf_counter()
    for _ in range(calls):
        work()
    synchronize(device)
    end = time.perf_counter()
    gc.enable()
    return (end - start) / calls


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def normal(*shapes: Sequence[int]) -> list[Tensor]:
    """Standard normal tensors, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator) for shape in shapes]


def passes(operation: Callable[..., Tensor], inputs: Callable[[], Sequence[Tensor]], device: str) -> Work:
    """Prepare a forward and backward pass that returns the output and the gradient of every input.

    The first input must have the shape of the output.
    """
    leaves = [x.to(device).requires_grad_() for x in inputs()]
    (gradient,) = (x.to(device) for x in normal(leaves[0].shape))

    def work() -> list[Tensor]:
        y = operation(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, gradient)]

    return work


def same_numbers(ours: Any, other: Any) -> None:
    """Raise AssertionError unless two tensors, or sequences of tensors, agree up to TOLERANCE."""
    for a, b in zip(_results(ours), _results(other), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=TOLERANCE * b.abs().max().item())


def same_shapes(ours: Any, other: Any) -> None:
    """Raise AssertionError unless the shapes agree: for implementations whose values differ by design."""
    assert [a.shape for a in _results(ours)] == [b.shape for b in _results(other)]


def _results(result: Any) -> Sequence[Any]:
    return [result] if isinstance(result, Tensor) else result


def peak(setup: Setup, place: Place) -> int:
    """Return the peak bytes of a call above those at rest, after one warm-up call. On a CPU in a process of its own."""
    if place.device == "cuda":
        return _peak(setup, place)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (setup, place))


def _peak(setup: Setup, place: Place) -> int:
    torch.set_num_threads(place.threads)
    work = setup(place.device)
    if place.device == "cuda":
        work()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    before = peak_memory()
    work()
    if _forget_peak():
        before = peak_memory()
        work()
    return max(0, peak_memory() - before)


def peak_memory() -> int:
    """Return the peak bytes of this process. On Linux from /proc, because getrusage starts at the peak of the parent."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _forget_peak() -> bool:
    """Return free memory to the system and reset the peak. Returns False if the system does not support it (only Linux does)."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (AttributeError, OSError):
        return False
    return True
