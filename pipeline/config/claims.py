"""claims.yaml: what the study is asked to decide, its rules, and its errors, one line each. Imports no torch."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from cat.config import Configuration, Count
from pipeline.config.errors import checked, nearest, refusal
from pipeline.config.grid import variants_on
from pipeline.config.names import CELL, Name
from pipeline.config.study import Study
from pipeline.config.yaml_file import read_yaml

FILE = Path("claims.yaml")
RECALL = ("recalled_share", "recalled_rare_share", "loss_recalled", "loss_recalled_rare", "loss_others")
METRICS = {
    "accuracy": ("accuracy", "sequence_accuracy", "loss"),
    "loss": ("bits_per_byte", "loss", "perplexity", "word_perplexity", "accuracy", *RECALL),
}
"""What a task is scored by, by its goal; the attention of each layer besides."""
OF_A_LAYER = re.compile(r"attention_(entropy|on_answer)_[1-9]\d*")
COST = "cost"
"""The figure of reports that belongs to no ablation."""
SHOWN = 5
"""Claims that cannot be decided, each with its reason; of more, the names must do."""
Multiple = Annotated[float, Field(gt=0)]
Names = Annotated[tuple[Name, ...], Field(min_length=1, strict=False)]


class Claim(Configuration):
    """A sentence and what decides it: of every task, length and pair of variants the effect is beyond a threshold."""

    says: Annotated[str, Field(pattern=CELL)]
    source: Literal["paper", "ours"]
    tasks: Names
    multiples: Annotated[tuple[Multiple, ...], Field(min_length=1, strict=False)]
    metric: Name | None = None
    """As in results/<task>.csv; the metric that stands for the task for None."""
    variants: Names
    than: Names | float | None = None
    """The variants on the other side, or a number."""
    than_multiple: Multiple | None = None
    """Instead: the same variants at this length."""
    direction: Literal["higher", "lower", "not_lower", "not_higher"]
    by: Annotated[float, Field(ge=0)]
    """The smallest difference that matters, in units of the metric."""
    seeds: Annotated[Count, Field(ge=2)]
    """So many at least; fewer decide nothing."""
    figure: Name
    """The ablation whose figure shows it, or `cost`."""

    @model_validator(mode="after")
    def _one_other_side(self) -> Self:
        if (self.than is None) == (self.than_multiple is None):
            raise ValueError("needs either than, variants or a number, or than_multiple, a length")
        if isinstance(self.than, tuple) and (both := set(self.variants) & set(self.than)):
            raise ValueError(f"{min(both)!r} is under variants and under than")
        if self.than_multiple in self.multiples:
            raise ValueError(f"than_multiple = {self.than_multiple:g} is among multiples")
        for key in ("tasks", "multiples", "variants", "than"):
            values = getattr(self, key)
            if isinstance(values, tuple) and (twice := {value for value in values if values.count(value) > 1}):
                raise ValueError(f"{key} has {min(twice)!r} twice")
        return self

    @property
    def sign(self) -> int:
        """1 where the claim holds of effects above `threshold`, -1 where it holds of effects below."""
        return 1 if self.direction in ("higher", "not_lower") else -1

    @property
    def threshold(self) -> float:
        return {"higher": self.by, "lower": -self.by, "not_lower": -self.by, "not_higher": self.by}[self.direction]


def load(path: Path = FILE) -> dict[str, Claim]:
    """The claims by name, none where there is no such file. Raises ParamsError with every fault."""
    if not path.exists():
        return {}
    raw = read_yaml(path)
    claims: dict[str, Claim] = checked(dict[Name, Claim], {} if raw is None else raw, path)
    return claims


def check(claims: dict[str, Claim], study: Study) -> None:
    """Raises ParamsError where a claim about the study is in no figure of it, or one has a metric that no kind of task has."""
    metrics = {metric for of_goal in METRICS.values() for metric in of_goal} | {"attention_entropy_1", "attention_on_answer_1"}
    faults = []
    for name, claim in claims.items():
        if claim.figure not in (*study.ablations, COST) and not any(_lacking(claim, study)):
            known = nearest(claim.figure, [*study.ablations, COST])
            faults.append(f"{name}.figure = {json.dumps(claim.figure)}: is not among ablations, and is not {COST}{known}")
        if not (claim.metric is None or claim.metric in metrics or OF_A_LAYER.fullmatch(claim.metric)):
            known = nearest(claim.metric, sorted(metrics)) or f"; known are {', '.join(sorted(metrics))}"
            faults.append(f"{name}.metric = {json.dumps(claim.metric)}: no task has it{known}")
    if faults:
        raise refusal(FILE, faults)


def undecided(claims: dict[str, Claim], study: Study) -> Iterator[str]:
    """What the study cannot decide, a line a claim with the reason, or all in one: claims are about several studies."""
    why = ((name, next(itertools.chain(_lacking(claim, study), _too_few(claim, study)), None)) for name, claim in claims.items())
    reasons = {name: reason for name, reason in why if reason}
    if len(reasons) == len(claims) > SHOWN:
        yield f"none of its {len(claims)} claims can be decided by this study"
    elif len(reasons) > SHOWN:
        yield f"{len(reasons)} of {len(claims)} claims cannot be decided by this study: {', '.join(reasons)}"
    else:
        yield from (f"{name}: {reason}" for name, reason in reasons.items())


def _lacking(claim: Claim, study: Study) -> Iterator[str]:
    """What the claim needs and the study does not have."""
    variants = [*claim.variants, *(claim.than if isinstance(claim.than, tuple) else ())]
    for kind, names, known in (("task", claim.tasks, [*study.tasks]), ("variant", variants, [*study.variants])):
        yield from (f"no {kind} {name} here{nearest(name, known)}" for name in names if name not in known)
    for task in filter(study.tasks.__contains__, claim.tasks):
        data = study.tasks[task].data
        yield from (f"{variant} is not trained on {task} here" for variant in variants if variant not in variants_on(study, task))
        for multiple in itertools.chain(claim.multiples, filter(None, [claim.than_multiple])):
            if multiple not in data.multiples:
                yield f"no multiple {multiple:g} of {task} here; there are {', '.join(f'{known:g}' for known in data.multiples)}"
        if not (claim.metric is None or claim.metric in METRICS[data.goal] or OF_A_LAYER.fullmatch(claim.metric)):
            yield f"no {claim.metric} of {task}{nearest(claim.metric, METRICS[data.goal])}"


def _too_few(claim: Claim, study: Study) -> Iterator[str]:
    if len(study.seeds) < claim.seeds:
        yield f"{len(study.seeds)} of {claim.seeds} seeds here"
