"""Profile a training step: its plain time, then the time of each part under PyTorch's profiler, which slows it down.

On a GPU this runs one model, kernel by kernel. Training itself replays a CUDA graph of the step (cat/training/cuda_graph.py).
If a task has several training lengths, the batches have the longest.
"""

from __future__ import annotations

import functools
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, cycle
from statistics import median
from typing import Any, NamedTuple

from tabulate import tabulate

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # no start and stop messages of the profiler; read when torch is imported

import torch
from torch.profiler import DeviceType, ProfilerActivity, record_function

from cat.evaluation.scores import MixedSplit
from cat.mixers.registry import ConstructionConfig
from cat.model import SequenceModel
from cat.seeding import derive_seed
from cat.training.fit import build_model, mean_loss, split_by_weight_decay
from cat.training.optimizer import AdamW
from pipeline.runtime import workers
from pipeline.runtime.devices import describe, resolve_device
from pipeline.stages.train import CellSetting
from pipeline.storage import runs
from pipeline.storage.paths import DATA
from pipeline.storage.task_data import read_meta

WARMUP_STEPS, SHOWN_OPERATORS = 5, 12
STEP, FORWARD, HEAD = "step", "forward", "head and loss"


class Profile(NamedTuple):
    """Times of some training steps."""

    seconds: list[float]
    """Per step, without the profiler."""
    parts: dict[str, float]
    """Part -> milliseconds per step under the profiler, in the order of the step; they add up to the step."""
    operators: list[tuple[str, float, float]]
    """Name, own milliseconds and calls per step of the most expensive operators, sorted by time."""


def profile(task: str, variant: str, setting: CellSetting, *, steps: int, device: str) -> str:
    """Profile the training of a cell, as text. Raises ValueError if it is not trained or has no data."""
    where = resolve_device(device)
    if isinstance(setting.model, ConstructionConfig):
        raise ValueError(f"{variant} is not trained: its weights are constructed")
    if not (DATA / task / "meta.json").exists():
        raise ValueError(f"{DATA / task}: is missing. Fix: run `dvc repro generate@{task}`")
    workers.prepare()
    meta = read_meta(task)
    seed = derive_seed(setting.training.seeds[0], task, "weights")
    model = build_model(setting.model, vocabulary=meta.vocabulary, length=meta.length, seed=seed).to(where)
    step, batch = training_step(model, task, setting, parts := Parts(where))
    result = measure(step, parts, steps)
    seconds = median(result.seconds)
    return (
        f"{task} {variant}, {describe(where)}, {setting.precision}, {batch} sequences of {meta.length} tokens:"
        f" {1e3 * seconds:.3f} ms per step (median of {steps}, minimum {1e3 * min(result.seconds):.3f}),"
        f" {batch * meta.length / seconds:,.0f} tokens per second\n\n{tables(result)}"
    )


class Parts:
    """Mark the parts of a step for the profiler: by `with parts(name)`, or by naming a method as a part."""

    def __init__(self, device: torch.device):
        self.device = device
        self.enabled = False
        self.methods: dict[str, None] = {}
        """Names of the parts that are methods, in order; several methods may share a name."""

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        if not self.enabled:
            yield
            return
        with record_function(name):
            yield
            self.synchronize()

    def synchronize(self) -> None:
        """Wait for the GPU, which runs asynchronously."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def mark_method(self, owner: Any, method: str, name: str) -> None:
        """Make every call of `owner.method` a part called `name`."""
        call = getattr(owner, method)

        @functools.wraps(call)
        def marked(*arguments: Any, **options: Any) -> Any:
            with self(name):
                return call(*arguments, **options)

        setattr(owner, method, marked)
        self.methods[name] = None


def training_step(model: SequenceModel, task: str, setting: CellSetting, parts: Parts) -> tuple[Callable[[], None], int]:
    """Build the training step of `cat.training.fit`; return it and its batch size."""
    split = runs.training_split(task, parts.device)
    train = split.splits[-1] if isinstance(split, MixedSplit) else split
    size = min(setting.training.batch, train.size)
    batches = cycle(torch.randperm(train.size).unfold(0, size, size))
    decayed, others = split_by_weight_decay(model)
    optimizer = AdamW(decayed, others, weight_decay=setting.training.weight_decay, grad_clip=setting.training.grad_clip)
    parts.mark_method(model.embedding, "forward", "embedding")
    for number, block in enumerate(model.layers(), start=1):
        for method in ("project", "mix"):
            parts.mark_method(block.mixer, method, f"block {number}: mixer")
        if block.mlp is not None:
            parts.mark_method(block.mlp, "forward", f"block {number}: mlp")
    parts.mark_method(model.head, "forward", HEAD)

    def step() -> None:
        with parts("data"):
            batch = train.rows(next(batches).to(parts.device))
        with parts(FORWARD):
            loss = mean_loss(model, batch, precision=setting.precision)
        with parts("backward"):
            loss.backward()
        with parts("clip and optimizer"):
            optimizer.step(setting.training.learning_rates[0])

    return step, size


def measure(step: Callable[[], None], parts: Parts, steps: int) -> Profile:
    """Time `steps` steps, then profile as many."""
    seconds = []
    for _ in range(WARMUP_STEPS + steps):
        start = time.perf_counter()
        step()
        parts.synchronize()
        seconds.append(time.perf_counter() - start)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if parts.device.type == "cuda" else [])]
    parts.enabled = True
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(steps):
            with parts(STEP):
                step()
    parts.enabled = False
    part_times = time_of_parts(profiler, parts.methods, steps)
    return Profile(seconds[WARMUP_STEPS:], part_times, time_of_operators(profiler, steps, parts.device))


def time_of_parts(profiler: torch.profiler.profile, forward_parts: Iterable[str], steps: int) -> dict[str, float]:
    """Milliseconds per step of each part; `forward_parts` are the parts of the forward pass.

    `forward: other` and `between` are the times outside all parts.
    """
    total: dict[str, float] = defaultdict(float)
    for event in profiler.events():
        if event.is_user_annotation and event.device_type == DeviceType.CPU:
            begin, end = event.time_range.start / 1e3 / steps, event.time_range.end / 1e3 / steps
            total[event.name] += end - begin
            # The loss takes the time between the end of the head and the end of the forward pass.
            total[HEAD] += {FORWARD: end, HEAD: -end}.get(event.name, 0)
    stages = ("data", FORWARD, "backward", "clip and optimizer")
    forward = {name: total[name] for name in forward_parts}
    forward["forward: other"] = total[FORWARD] - sum(forward.values())
    parts = {stage: forward if stage == FORWARD else {stage: total[stage]} for stage in stages}
    between = {"between": total[STEP] - sum(total[stage] for stage in stages)}
    return dict(chain.from_iterable(part.items() for part in (*parts.values(), between)))


def time_of_operators(profiler: torch.profiler.profile, steps: int, device: torch.device) -> list[tuple[str, float, float]]:
    """The most expensive operators by their own time; on a GPU, by the time of their kernels."""
    rows = []
    for event in profiler.key_averages():
        microseconds = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        if not event.is_user_annotation and event.device_type == DeviceType.CPU:
            rows.append((event.key, microseconds / 1e3 / steps, event.count / steps))
    return sorted(rows, key=lambda row: -row[1])[:SHOWN_OPERATORS]


def tables(result: Profile) -> str:
    """Format both tables; shares refer to a step under the profiler."""
    step = sum(result.parts.values())
    parts = [[name, ms, f"{ms / step:.1%}"] for name, ms in result.parts.items()]
    operators = [[name, ms, calls, f"{ms / step:.1%}"] for name, ms, calls in result.operators]
    return (
        f"Under the profiler, {step:.3f} ms per step:\n\n"
        + tabulate(
            [*parts, ["total", step, "100.0%"]], ["part", "ms", "share"], floatfmt=".3f", colalign=("left", "right", "right")
        )
        + "\n\n"
        + tabulate(
            operators,
            ["operator", "own ms", "calls", "share"],
            floatfmt=("", ".3f", ".0f"),
            colalign=("left", "right", "right", "right"),
        )
    )
