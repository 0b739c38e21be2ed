"""The schema of params.yaml. Importing it does not import torch."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from cat.config import Config, Count, OptimizerConfig, TrainingConfig
from cat.mixers.registry import AnyVariant
from cat.tasks.registry import AnyTask
from pipeline.config.names import DEVICE, LINE, Name, PlotName


class TaskConfig(Config):
    """One task: its data and its training schedule."""

    renamed_keys: ClassVar = {"train": "training"}
    data: AnyTask
    training: TrainingConfig


class Ablation(Config):
    """One question: each of its variants is trained on each of its tasks, and one figure shows the results."""

    renamed_keys: ClassVar = {"beside": "reference_variants", "across": "reference_tasks", "figure": "plot"}
    question: Annotated[str, Field(pattern=LINE)]
    tasks: Annotated[tuple[Name, ...], Field(strict=False)]
    variants: Annotated[tuple[Name, ...], Field(strict=False)]
    reference_variants: Annotated[tuple[Name, ...], Field(strict=False)] = ()
    """Variants that another ablation trains and that this figure also shows."""
    reference_tasks: Annotated[tuple[Name, ...], Field(strict=False)] = ()
    """Tasks on which other ablations train these variants and that this figure also shows."""
    plot: PlotName
    """Kind of figure: a file of pipeline/figures/, or a module of your own."""
    x: Name | Annotated[tuple[Name, ...], Field(min_length=1, strict=False)] | None = None
    """The key of a variant on the axis of a sweep or contrast. Keys in a list have the same value in each variant."""
    reference_lines: Annotated[tuple[Name, ...], Field(strict=False)] = ()
    """Scores that the tasks state and that the figure also shows, such as that of guessing."""

    @property
    def x_keys(self) -> tuple[str, ...]:
        return (self.x,) if isinstance(self.x, str) else self.x or ()

    @model_validator(mode="after")
    def _check_keys(self) -> Self:
        for key in ("tasks", "variants", "reference_variants", "reference_tasks", "x_keys", "reference_lines"):
            names = getattr(self, key)
            twice = {name for name in names if names.count(name) > 1}
            if twice:
                raise ValueError(f"{key.removesuffix('_keys')} contains {min(twice)!r} twice")
        for key, other in (("variants", "reference_variants"), ("tasks", "reference_tasks")):
            if both := set(getattr(self, key)) & set(getattr(self, other)):
                raise ValueError(f"{min(both)!r} is in both {key} and {other}")
        return self


class EvaluationConfig(Config):
    """How the test splits are scored."""

    multiples: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1, strict=False)]
    """The lengths that tables and `dvc metrics` show, as multiples of the training length."""

    @model_validator(mode="after")
    def _check_multiples(self) -> Self:
        if len(set(self.multiples)) < len(self.multiples):
            raise ValueError(f"multiples = {list(self.multiples)} contains a value twice")
        return self


class RenderConfig(Config):
    """How figures look."""

    renamed_keys: ClassVar = {"spread": "error_band"}
    error_band: Literal["range", "sd"]
    """Band around the mean over seeds: `range` is minimum to maximum, `sd` one standard deviation."""


class Resources(Config):
    """What one run reserves on a machine of a Ray cluster; runs that train together on a GPU share one reservation."""

    cpus: Annotated[float, Field(gt=0)] = 1
    gpus: Annotated[float, Field(ge=0, le=1)] = 0
    """Share of one GPU; 0 trains on the CPU."""
    memory_gb: Annotated[float, Field(gt=0)] = 1

    @property
    def bytes(self) -> int:
        return math.ceil(self.memory_gb * 1e9)

    def __str__(self) -> str:
        return f"{self.cpus:g} CPU, {self.gpus:g} GPU and {self.memory_gb:g} GB of memory"


class ClusterResources(Resources):
    """Resources of a run on every task, and exceptions for single tasks."""

    tasks: dict[Name, Resources] = Field(default_factory=dict)

    def on(self, task: str) -> Resources:
        """Resources of a run on `task`; keys that the task does not set have the common value."""
        common = self.model_dump(exclude={"tasks"})
        own = self.tasks[task].model_dump(exclude_unset=True) if task in self.tasks else {}
        return Resources(**{**common, **own})


class Study(Config):
    """The whole of params.yaml."""

    renamed_keys: ClassVar = {"threads": "parallel_runs", "train": "optimizer"}
    seeds: Annotated[tuple[Annotated[int, Field(ge=0, lt=2**31)], ...], Field(min_length=1, strict=False)]
    data_seed: Annotated[int, Field(ge=0, lt=2**31)]
    device: Annotated[str, Field(pattern=DEVICE)]
    precision: Literal["float32", "bfloat16"]
    deterministic: bool
    """Get the same bits on all kinds of CPU, at some cost in time (pipeline/runtime/determinism.py)."""
    parallel_runs: Count | Literal["auto"]
    resources: ClusterResources = ClusterResources()
    tasks: Annotated[dict[Name, TaskConfig], Field(min_length=1)]
    variants: Annotated[dict[Name, AnyVariant], Field(min_length=1)]
    ablations: Annotated[dict[Name, Ablation], Field(min_length=1)]
    optimizer: OptimizerConfig
    evaluate: EvaluationConfig
    render: RenderConfig

    @model_validator(mode="after")
    def _check_seeds(self) -> Self:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds = {list(self.seeds)} contains a seed twice")
        return self
