"""The schema of params.yaml, and the study that it declares. Importing it does not import torch.

StudyFile    params.yaml as it is written: defaults, and what each task and variant changes
Study        complete: every variant is a model, every cell has its training settings (pipeline/config/resolve.py)
"""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from cat.config import Config, Count, TrainingConfig
from cat.mixers.registry import AnyVariant
from cat.tasks.registry import AnyTask, Task
from pipeline.config.names import DEVICE, LINE, Name, PlotName

MAX_SEEDS = 1000
Settings = dict[str, Any]
"""Keys and values that are checked where they are used."""
Line = Annotated[str, Field(pattern=LINE)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]


def _count_to_seeds(value: object) -> object:
    """`seeds: 3` means the seeds 0, 1 and 2."""
    return tuple(range(value)) if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MAX_SEEDS else value


class CellTraining(TrainingConfig):
    """Training of one cell: a run per learning rate and seed."""

    learning_rates: Annotated[tuple[Annotated[float, Field(gt=0, le=1)], ...], Field(min_length=1, strict=False)]
    """Peak learning rates to try; the validation split chooses one for all seeds of the cell."""
    seeds: Annotated[
        tuple[Seed, ...],
        Field(min_length=1, strict=False),
        BeforeValidator(_count_to_seeds, json_schema_input_type=Count | tuple[Seed, ...]),
    ]
    """Seeds of weights and batch order: their number, or a list."""

    @model_validator(mode="after")
    def _values_differ(self) -> Self:
        for key in ("learning_rates", "seeds"):
            values = getattr(self, key)
            if len(set(values)) < len(values):
                raise ValueError(f"{key} = {list(values)} has a value twice")
        return self

    @property
    def run(self) -> dict[str, Any]:
        """The settings of one run, for `fit`."""
        return self.model_dump(exclude={"learning_rates", "seeds"})


class TaskFile(Config):
    """One task as written: its data, and the training settings that differ from the defaults."""

    renamed_keys: ClassVar = {"train": "training"}
    label: Line | None = None
    """Its name in figures and the report; None: the name follows from the data."""
    data: AnyTask
    training: Settings = Field(default_factory=dict)


class TaskConfig(Config):
    """One task of a complete study."""

    data: SerializeAsAny[Task]


class Ablation(Config):
    """One question: each of its variants is trained on each of its tasks, and one figure shows the results."""

    renamed_keys: ClassVar = {"beside": "reference_variants", "across": "reference_tasks", "figure": "plot"}
    question: Line
    limits: Line | None = None
    """What the result does not show, for the report."""
    tasks: Annotated[tuple[Name, ...], Field(strict=False)] = ()
    variants: Annotated[tuple[Name, ...], Field(strict=False)] = ()
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


class StudyFile(Config):
    """The whole of params.yaml."""

    renamed_keys: ClassVar = {
        "threads": "parallel_runs",
        "seeds": "defaults.training.seeds",
        "train": "defaults.training",
        "optimizer": "defaults.training",
    }
    title: Line | None = None
    """The name of the study, which the report has as its title."""
    data_seed: Seed
    device: Annotated[str, Field(pattern=DEVICE)]
    precision: Literal["float32", "bfloat16"]
    deterministic: bool
    """Get the same bits on all kinds of CPU, at some cost in time (pipeline/runtime/determinism.py)."""
    parallel_runs: Count | Literal["auto"]
    live: bool = True
    """Show runs in MLflow and in `python -m pipeline watch` while they train."""
    resources: ClusterResources = ClusterResources()
    defaults: Settings
    """The baseline: the keys of a model and of its mixers, and `training`. Each applies to the variants that have the key."""
    tasks: Annotated[dict[Name, TaskFile], Field(min_length=1)]
    variants: Annotated[dict[Name, Settings], Field(min_length=1)]
    """What each variant changes: keys of the model and its mixers, and `training`. `label` is its name in figures."""
    ablations: Annotated[dict[Name, Ablation], Field(min_length=1)]
    evaluate: EvaluationConfig
    render: RenderConfig
    verdict_seeds_from: Seed = 0
    """Verdicts come from the seeds from this number on. Smaller seeds explore, and show in figures and tables only."""


class Study(Config):
    """A complete study."""

    title: str | None = None
    data_seed: int
    device: str
    precision: Literal["float32", "bfloat16"]
    deterministic: bool
    parallel_runs: int | Literal["auto"]
    live: bool
    resources: ClusterResources
    tasks: dict[str, TaskConfig]
    variants: dict[str, AnyVariant]
    task_labels: dict[str, str] = Field(default_factory=dict)
    variant_labels: dict[str, str] = Field(default_factory=dict)
    """Names of tasks and variants that the file states."""
    ablations: dict[str, Ablation]
    switched_off: tuple[str, ...]
    """Ablations that dvc.yaml has a stage for and that this study does not have: empty lists of tasks and variants."""
    training: dict[tuple[str, str], CellTraining]
    """(task, variant) of each cell -> its training settings."""
    evaluate: EvaluationConfig
    render: RenderConfig
    verdict_seeds_from: int = 0
