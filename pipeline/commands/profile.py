"""Where a training step's time goes: timed as it is, then taken apart under PyTorch's profiler, which slows it down.

On a GPU the step is that of one model, kernel by kernel, where training replays a recording of it (cat/training/cuda_graph.py).
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

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler says on stderr that it starts and stops, read as torch is imported

import torch
from torch.profiler import DeviceType, ProfilerActivity, record_function

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

WARM_UP, OPERATORS = 5, 12
STEP, FORWARD, HEAD = "step", "forward", "head and loss"


class Profile(NamedTuple):
    """What some steps took."""

    seconds: list[float]
    """Of each, without the profiler."""
    parts: dict[str, float]
    """Milliseconds of each part of a step under the profiler, in the order of the step; together they are the step."""
    operators: list[tuple[str, float, float]]
    """Name, milliseconds and calls a step of the operators that take most of it themselves, the most expensive first."""


def profile(task: str, variant: str, setting: CellSetting, *, steps: int, device: str) -> str:
    """The profile of the cell's training as text. Raises ValueError where there is nothing to train, or no data."""
    where = resolve_device(device)
    if isinstance(setting.model, ConstructionConfig):
        raise ValueError(f"{variant} is not trained: its weights are prescribed")
    if not (DATA / task / "meta.json").exists():
        raise ValueError(f"{DATA / task} is not there; run `dvc repro generate@{task}`")
    workers.prepare()
    meta = read_meta(task)
    seed = derive_seed(setting.seeds[0], task, "weights")
    model = build_model(setting.model, vocabulary=meta.vocabulary, length=meta.length, seed=seed).to(where)
    step, batch = training_step(model, task, setting, part := Parts(where))
    result = measure(step, part, steps)
    took = median(result.seconds)
    return (
        f"{task} {variant}, {describe(where)}, {setting.precision}, {batch} sequences of {meta.length} tokens:"
        f" {1e3 * took:.3f} ms a step (median of {steps}, at least {1e3 * min(result.seconds):.3f}),"
        f" {batch * meta.length / took:,.0f} tokens a second\n\n{tables(result)}"
    )


class Parts:
    """Names the parts of a step to the profiler: `with part(name)`, or a method that is to be one whenever it is called."""

    def __init__(self, device: torch.device):
        self.device = device
        self.watched = False
        self.methods: dict[str, None] = {}
        """Names of methods that are parts, in the order in which they were given."""

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        if not self.watched:
            yield
            return
        with record_function(name):
            yield
            self.wait()

    def wait(self) -> None:
        """A GPU works on behind the program's back."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def of(self, owner: Any, method: str, name: str) -> None:
        call = getattr(owner, method)

        @functools.wraps(call)
        def named(*arguments: Any, **options: Any) -> Any:
            with self(name):
                return call(*arguments, **options)

        setattr(owner, method, named)
        self.methods[name] = None


def training_step(model: SequenceModel, task: str, setting: CellSetting, part: Parts) -> tuple[Callable[[], None], int]:
    """The step of `cat.training.fit`, and how many sequences it takes."""
    train = runs.training_split(task, part.device)
    size = min(setting.training.batch, train.size)
    batches = cycle(torch.randperm(train.size).unfold(0, size, size))
    decayed, others = split_by_weight_decay(model)
    optimizer = AdamW(decayed, others, weight_decay=setting.optimizer.weight_decay, clip=setting.optimizer.grad_clip)
    part.of(model.embedding, "forward", "embedding")
    for number, block in enumerate(model.layers(), start=1):
        for method in ("project", "combine"):
            part.of(block.mixer, method, f"block {number}: mixer")
        if block.mlp is not None:
            part.of(block.mlp, "forward", f"block {number}: mlp")
    part.of(model.head, "forward", HEAD)

    def step() -> None:
        with part("data"):
            batch = train.rows(next(batches).to(part.device))
        with part(FORWARD):
            loss = mean_loss(model, batch, precision=setting.precision)
        with part("backward"):
            loss.backward()
        with part("clip and optimizer"):
            optimizer.step(setting.training.learning_rates[0])

    return step, size


def measure(step: Callable[[], None], part: Parts, steps: int) -> Profile:
    """Times `steps` steps, then profiles as many."""
    seconds = []
    for _ in range(WARM_UP + steps):
        start = time.perf_counter()
        step()
        part.wait()
        seconds.append(time.perf_counter() - start)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if part.device.type == "cuda" else [])]
    part.watched = True
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(steps):
            with part(STEP):
                step()
    part.watched = False
    return Profile(seconds[WARM_UP:], parts_of(profiler, part.methods, steps), operators_of(profiler, steps, part.device))


def parts_of(profiler: torch.profiler.profile, inside: Iterable[str], steps: int) -> dict[str, float]:
    """Milliseconds a step of each part, those `inside` a forward pass named; what is in no part is there as other or between."""
    total: dict[str, float] = defaultdict(float)
    for event in profiler.events():
        if event.is_user_annotation and event.device_type == DeviceType.CPU:
            begin, end = event.time_range.start / 1e3 / steps, event.time_range.end / 1e3 / steps
            total[event.name] += end - begin
            total[HEAD] += {FORWARD: end, HEAD: -end}.get(event.name, 0)  # all that follows the head is the loss
    stages = ("data", FORWARD, "backward", "clip and optimizer")
    forward = {name: total[name] for name in inside}
    forward["forward: other"] = total[FORWARD] - sum(forward.values())
    parts = {stage: forward if stage == FORWARD else {stage: total[stage]} for stage in stages}
    between = {"between": total[STEP] - sum(total[stage] for stage in stages)}
    return dict(chain.from_iterable(part.items() for part in (*parts.values(), between)))


def operators_of(profiler: torch.profiler.profile, steps: int, device: torch.device) -> list[tuple[str, float, float]]:
    """The operators that take most of a step themselves: on a GPU by the time of their kernels."""
    rows = []
    for event in profiler.key_averages():
        took = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        if not event.is_user_annotation and event.device_type == DeviceType.CPU:
            rows.append((event.key, took / 1e3 / steps, event.count / steps))
    return sorted(rows, key=lambda row: -row[1])[:OPERATORS]


def tables(result: Profile) -> str:
    """Both tables; the shares are of a step under the profiler."""
    step = sum(result.parts.values())
    parts = [[name, took, f"{took / step:.1%}"] for name, took in result.parts.items()]
    operators = [[name, took, calls, f"{took / step:.1%}"] for name, took, calls in result.operators]
    return (
        f"Under the profiler, {step:.3f} ms a step:\n\n"
        + tabulate(
            [*parts, ["a step", step, "100.0%"]], ["part", "ms", "share"], floatfmt=".3f", colalign=("left", "right", "right")
        )
        + "\n\n"
        + tabulate(
            operators,
            ["operator", "self ms", "calls", "share"],
            floatfmt=("", ".3f", ".0f"),
            colalign=("left", "right", "right", "right"),
        )
    )
