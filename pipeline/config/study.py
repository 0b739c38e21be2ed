"""params.yaml: its schema, its rules across sections, and its errors, one line each.

Read with the YAML 1.2 parser that DVC reads it with. Importing this imports no torch.
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from cat.config import Config, Count, OptimizerConfig, TrainingConfig
from cat.mixers.registry import AnyVariant
from cat.tasks.registry import AnyTask
from pipeline.config.names import DEVICE, LINE, Name


class TaskConfig(Config):
    """One task: what its examples are, and how long it is trained."""

    renamed_keys: ClassVar = {"train": "training"}
    data: AnyTask
    training: TrainingConfig


class Ablation(Config):
    """One question: every variant of it is trained on every task of it, then drawn in one figure."""

    renamed_keys: ClassVar = {"beside": "reference_variants", "across": "reference_tasks", "figure": "plot"}
    question: Annotated[str, Field(pattern=LINE)]
    tasks: Annotated[tuple[Name, ...], Field(strict=False)]
    variants: Annotated[tuple[Name, ...], Field(strict=False)]
    reference_variants: Annotated[tuple[Name, ...], Field(strict=False)] = ()
    """Variants that another ablation trains and that belong in this figure as well."""
    reference_tasks: Annotated[tuple[Name, ...], Field(strict=False)] = ()
    """Tasks on which other ablations train these variants and that belong in this figure as well."""
    plot: Literal[
        "heatmap",
        "sweep",
        "contrast",
        "lines",
        "attention",
        "learning_rates",
        "stability",
        "example",
        "filters",
        "positions",
        "recall",
    ]
    """heatmap: variants by tasks; sweep: against a number `x`; contrast: by `x`, filtered beside unfiltered; lines: by length;
    attention: how many tokens share it and how much is on the answer; rates: by learning rate, how many seeds found a key filter
    that solves every length; stability: by learning rate, what every run ended at and what its loss, gradients and attention went
    through; example: what attention reads in one sequence of recall; filters: taps beside the theorem's; positions: bits along
    the windows of a text; recall: what is gained on the first variant, on answers that can be recalled and on others."""
    x: Name | None = None
    """The key of a variant that a sweep or a contrast has on its axis."""

    @property
    def shows_models(self) -> bool:
        """Whether its figure is of models, or of single answers, rather than of their scores."""
        return self.plot in ("example", "filters", "positions", "recall")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.x is not None) != (self.plot in ("sweep", "contrast")):
            raise ValueError(f"plot = {self.plot} " + ("needs x, the key on its axis" if self.x is None else "has no axis x"))
        for key in ("tasks", "variants", "reference_variants", "reference_tasks"):
            names = getattr(self, key)
            twice = {name for name in names if names.count(name) > 1}
            if twice:
                raise ValueError(f"{key} has {min(twice)!r} twice")
        for key, other in (("variants", "reference_variants"), ("tasks", "reference_tasks")):
            if both := set(getattr(self, key)) & set(getattr(self, other)):
                raise ValueError(f"{min(both)!r} is under {key} and under {other}")
        return self


class EvaluationConfig(Config):
    """How the test splits are scored."""

    multiples: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1, strict=False)]
    """The multiples of the training length that the tables and `dvc metrics` show."""

    @model_validator(mode="after")
    def _multiples_differ(self) -> Self:
        if len(set(self.multiples)) < len(self.multiples):
            raise ValueError(f"multiples = {list(self.multiples)} has a value twice")
        return self


class RenderConfig(Config):
    """How figures look."""

    renamed_keys: ClassVar = {"spread": "error_band"}
    dpi: Annotated[int, Field(ge=50, le=600)]
    error_band: Literal["range", "sd"]
    """What the bands around a mean over seeds show: smallest to largest, or one standard deviation."""


class Resources(Config):
    """What a run asks of a machine of a Ray cluster; several that are trained at once on a GPU ask it together."""

    cpus: Annotated[float, Field(gt=0)] = 1
    gpus: Annotated[float, Field(ge=0, le=1)] = 0
    """The share of one GPU; 0 trains on the CPU."""
    memory_gb: Annotated[float, Field(gt=0)] = 1

    @property
    def bytes(self) -> int:
        return math.ceil(self.memory_gb * 1e9)

    def __str__(self) -> str:
        return f"{self.cpus:g} CPU, {self.gpus:g} GPU and {self.memory_gb:g} GB of memory"


class ClusterResources(Resources):
    """What a run asks on every task, and where a task asks for something else."""

    tasks: dict[Name, Resources] = Field(default_factory=dict)

    def on(self, task: str) -> Resources:
        """What a run asks on `task`: what is not given for it is as it is for all."""
        common = self.model_dump(exclude={"tasks"})
        own = self.tasks[task].model_dump(exclude_unset=True) if task in self.tasks else {}
        return Resources(**{**common, **own})


class Study(Config):
    """All of params.yaml."""

    renamed_keys: ClassVar = {"threads": "parallel_runs", "train": "optimizer"}
    seeds: Annotated[tuple[Annotated[int, Field(ge=0, lt=2**31)], ...], Field(min_length=1, strict=False)]
    data_seed: Annotated[int, Field(ge=0, lt=2**31)]
    device: Annotated[str, Field(pattern=DEVICE)]
    precision: Literal["float32", "bfloat16"]
    deterministic: bool
    """The same last bits on CPUs of all kinds, at some cost in time (pipeline/runtime/determinism.py)."""
    parallel_runs: Count | Literal["auto"]
    resources: ClusterResources = ClusterResources()
    tasks: Annotated[dict[Name, TaskConfig], Field(min_length=1)]
    variants: Annotated[dict[Name, AnyVariant], Field(min_length=1)]
    ablations: Annotated[dict[Name, Ablation], Field(min_length=1)]
    optimizer: OptimizerConfig
    evaluate: EvaluationConfig
    render: RenderConfig

    @model_validator(mode="after")
    def _seeds_differ(self) -> Self:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds = {list(self.seeds)} has a seed twice")
        return self
