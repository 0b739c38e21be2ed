"""Two ways of doing the same, measured in turn in one process; the memory of each in a process of its own.

A case names its two ways by functions that make them ready: they are called again in the processes that measure memory.
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
from pipeline.runtime.processes import MAP, TRIM, keep_memory

REPEATS = 5
"""Measurements of each way, the two in turn."""
SHORTEST = 0.1
"""Seconds of one measurement at least: what is faster is called several times in it."""
USUAL = 1 << 25
"""Bytes: the most that glibc comes to keep by itself."""
TOLERANCE = 1e-3
"""How far two outcomes may differ, as a share of the largest number in them."""

Work = Callable[[], Any]
Setup = Callable[[str], Work]
"""Makes ready on a device, cpu or cuda, what is then measured. Top-level functions and partials of them: they are pickled."""
Agree = Callable[[Any, Any], None]


class Place(NamedTuple):
    """Where a figure is measured."""

    device: str
    threads: int


class Unit(NamedTuple):
    """What a figure says of the seconds of ours and the other's."""

    name: str
    of: Callable[[float, float], float]
    more_is_better: bool = False


SPEEDUP = Unit("times as fast", lambda ours, other: other / ours, more_is_better=True)
COST = Unit("times the time", lambda ours, other: ours / other)
POWER = Unit("power of the length", lambda ours, other: math.log2(ours / other))
"""p of time ~ L^p, where ours is twice as long as the other."""
SECONDS = Unit("seconds", lambda ours, other: ours)


@dataclass(frozen=True, kw_only=True)
class Side:
    """One of the two: seconds a call, as the median and the range of the repeats, and bytes at the peak above those at rest."""

    name: str
    seconds: float
    fastest: float
    slowest: float
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Figure:
    """What came of a case. `low` and `high` are the range of the figure over the repeats, each repeat a figure of its own."""

    case: str
    value: float
    low: float
    high: float
    unit: str
    target: float | None
    met: bool | None
    """None where nothing is asked of the figure."""
    ours: Side
    other: Side
    rate: str | None = None
    """What ours gets through in a second."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked of two ways of doing the same."""

    name: str
    sides: tuple[str, str]
    """What ours and the other are called."""
    unit: Unit = SPEEDUP
    target: float | None = None
    count: tuple[int, str] | None = None
    """What a call gets through: how many of what."""


@dataclass(frozen=True, kw_only=True)
class Case(Question):
    """A question, and the two ways."""

    ours: Setup
    other: Setup
    agree: Agree | None = None
    """Raises AssertionError where two outcomes are not the same; None: `same_numbers`."""
    replay: bool = False
    """Whether both are replayed on a GPU, as a step of training is (cuda_graph.py): without what a launch takes of the CPU."""


class NotRun(Exception):  # noqa: N818  it is no error
    """Says why a benchmark cannot be run here."""


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A row of the suite: what is measured and what is asked of it, in words, and the figures, measured as they are drawn."""

    what: str
    target: str
    figures: Callable[[Place], Iterator[Figure]]
    """Raises NotRun."""


def compared(cases: Callable[[str], Sequence[Case]]) -> Callable[[Place], Iterator[Figure]]:
    """The figures of the cases that there are on a device."""
    return lambda place: (compare(case, place) for case in cases(place.device))


def compare(case: Case, place: Place) -> Figure:
    """Both ways of `case` checked against each other, then measured."""
    torch.set_num_threads(place.threads)
    keep_memory()  # as a run does
    ours, other = (_made(way, case.replay, place.device) for way in (case.ours, case.other))
    times = in_turn(ours, other, agree=case.agree or same_numbers, device=place.device)
    del ours, other
    return answer(case, *times, memory=(peak(case.ours, place), peak(case.other, place)))


def _made(way: Setup, replay: bool, device: str) -> Work:
    work = way(device)
    return GraphedFunction(work) if replay and device == "cuda" else work


def answer(question: Question, ours: Sequence[float], other: Sequence[float], *, memory: Sequence[int]) -> Figure:
    """The figure of the seconds that the two took, repeat by repeat."""
    unit, target = question.unit, question.target
    values = [unit.of(a, b) for a, b in zip(ours, other, strict=True)]
    value = median(values)
    first, second = (
        Side(name=name, seconds=median(times), fastest=min(times), slowest=max(times), bytes=size)
        for name, times, size in zip(question.sides, (ours, other), memory, strict=True)
    )
    return Figure(
        case=question.name,
        value=value,
        low=min(values),
        high=max(values),
        unit=unit.name,
        target=target,
        met=None if target is None else value >= target if unit.more_is_better else value <= target,
        ours=first,
        other=second,
        rate=f"{question.count[0] / first.seconds:,.0f} {question.count[1]}" if question.count else None,
    )


def in_turn(ours: Work, other: Work, *, agree: Agree, device: str) -> tuple[list[float], list[float]]:
    """Seconds a call of both, repeat by repeat. Three calls of each warm up, and what comes of them must be the same."""
    calls: list[int] = []
    for _ in range(3):
        outcomes, calls = [], []
        for work in (ours, other):
            start = time.perf_counter()
            outcomes.append(work())
            synchronize(device)
            calls.append(max(1, math.ceil(SHORTEST / (time.perf_counter() - start))))
        agree(*outcomes)
    del outcomes
    rows = [[seconds(work, n, device) for work, n in zip((ours, other), calls, strict=True)] for _ in range(REPEATS)]
    return [row[0] for row in rows], [row[1] for row in rows]


def seconds(work: Work, calls: int, device: str) -> float:
    """Seconds a call, the mean of `calls`; without the pauses of garbage collection."""
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
    """Standard normal numbers, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator) for shape in shapes]


def passes(operation: Callable[..., Tensor], inputs: Callable[[], Sequence[Tensor]], device: str) -> Work:
    """A forward and a backward pass at `inputs()`, the first of which has the output's shape: the output, every gradient."""
    leaves = [x.to(device).requires_grad_() for x in inputs()]
    (gradient,) = (x.to(device) for x in normal(leaves[0].shape))

    def work() -> list[Tensor]:
        y = operation(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, gradient)]

    return work


def same_numbers(ours: Any, other: Any) -> None:
    """Raises AssertionError unless the two agree up to rounding: a tensor, or several."""
    pairs = [(ours, other)] if isinstance(ours, Tensor) else zip(ours, other, strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=0, atol=TOLERANCE * b.abs().max().item())


def same_shapes(ours: Any, other: Any) -> None:
    """Raises AssertionError unless the two have the same shapes: for ways that differ in their numbers by design."""
    assert [a.shape for a in ours] == [b.shape for b in other]


def peak(setup: Setup, place: Place) -> int:
    """Bytes at the peak of a call above those at rest, after a call that warms up; on a CPU in a process of its own."""
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
    """Bytes that this process has had at most. On Linux from /proc: what getrusage says begins at the parent's."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def give_back_memory() -> None:
    """Has the process give freed memory back to the system as most processes do: the opposite of `keep_memory`."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        c = ctypes.CDLL(None)
        c.mallopt(TRIM, USUAL)
        c.mallopt(MAP, USUAL)


def _forget_peak() -> bool:
    """Gives back what is free and begins the peak anew, if that can be done here: on Linux."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (AttributeError, OSError):
        return False
    return True
