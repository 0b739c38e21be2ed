"""claims.yaml: what the study is asked to decide, its rules, and its errors, one line each. Imports no torch."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from cat.config import Config, Count
from pipeline.config.errors import config_error, nearest, parse_config
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


class Claim(Config):
    """A sentence and what decides it: of every task, length and pair of variants the effect is beyond a threshold."""

    renamed_keys: ClassVar = {
        "says": "statement", "than": "baseline", "than_multiple": "baseline_multiple", "by": "margin", "direction": "test",
        "seeds": "min_seeds", "figure": "ablation",
    }  # fmt: skip
    statement: Annotated[str, Field(pattern=CELL)]
    source: Literal["paper", "ours"]
    tasks: Names
    multiples: Annotated[tuple[Multiple, ...], Field(min_length=1, strict=False)]
    metric: Name | None = None
    """As in results/<task>.csv; the metric that stands for the task for None."""
    variants: Names
    baseline: Names | float | None = None
    """The variants on the other side, or a number."""
    baseline_multiple: Multiple | None = None
    """Instead: the same variants at this length."""
    test: Literal["superior", "inferior", "non_inferior", "non_superior"]
    margin: Annotated[float, Field(ge=0)]
    """The smallest difference that matters, in units of the metric."""
    min_seeds: Annotated[Count, Field(ge=2)]
    """So many at least; fewer decide nothing."""
    ablation: Name
    """The ablation whose figure shows it, or `cost`."""

    @model_validator(mode="after")
    def _one_other_side(self) -> Self:
        if (self.baseline is None) == (self.baseline_multiple is None):
            raise ValueError("needs either baseline, variants or a number, or baseline_multiple, a length")
        if isinstance(self.baseline, tuple) and (both := set(self.variants) & set(self.baseline)):
            raise ValueError(f"{min(both)!r} is under variants and under baseline")
        if self.baseline_multiple in self.multiples:
            raise ValueError(f"baseline_multiple = {self.baseline_multiple:g} is among multiples")
        for key in ("tasks", "multiples", "variants", "baseline"):
            values = getattr(self, key)
            if isinstance(values, tuple) and (twice := {value for value in values if values.count(value) > 1}):
                raise ValueError(f"{key} has {min(twice)!r} twice")
        return self

    @property
    def sign(self) -> int:
        """1 where the claim holds of effects above `threshold`, -1 where it holds of effects below."""
        return 1 if self.test in ("superior", "non_inferior") else -1

    @property
    def threshold(self) -> float:
        return self.margin if self.test in ("superior", "non_superior") else -self.margin


def load(path: Path = FILE) -> dict[str, Claim]:
    """The claims by name, none where there is no such file. Raises ParamsError with every fault."""
    if not path.exists():
        return {}
    raw = read_yaml(path)
    claims: dict[str, Claim] = parse_config(dict[Name, Claim], {} if raw is None else raw, path)
    return claims


def check(claims: dict[str, Claim], study: Study) -> None:
    """Raises ParamsError where a claim about the study is in no figure of it, or one has a metric that no kind of task has."""
    metrics = {metric for of_goal in METRICS.values() for metric in of_goal} | {"attention_entropy_1", "attention_on_answer_1"}
    faults = []
    for name, claim in claims.items():
        if claim.ablation not in (*study.ablations, COST) and not any(_missing_from(claim, study)):
            known = nearest(claim.ablation, [*study.ablations, COST])
            faults.append(f"{name}.ablation = {json.dumps(claim.ablation)}: is not among ablations, and is not {COST}{known}")
        if not (claim.metric is None or claim.metric in metrics or OF_A_LAYER.fullmatch(claim.metric)):
            known = nearest(claim.metric, sorted(metrics)) or f"; known are {', '.join(sorted(metrics))}"
            faults.append(f"{name}.metric = {json.dumps(claim.metric)}: no task has it{known}")
    if faults:
        raise config_error(FILE, faults)


def undecided(claims: dict[str, Claim], study: Study) -> Iterator[str]:
    """What the study cannot decide, a line a claim with the reason, or all in one: claims are about several studies."""
    why = (
        (name, next(itertools.chain(_missing_from(claim, study), _too_few(claim, study)), None)) for name, claim in claims.items()
    )
    reasons = {name: reason for name, reason in why if reason}
    if len(reasons) == len(claims) > SHOWN:
        yield f"none of its {len(claims)} claims can be decided by this study"
    elif len(reasons) > SHOWN:
        yield f"{len(reasons)} of {len(claims)} claims cannot be decided by this study: {', '.join(reasons)}"
    else:
        yield from (f"{name}: {reason}" for name, reason in reasons.items())


def _missing_from(claim: Claim, study: Study) -> Iterator[str]:
    """What the claim needs and the study does not have."""
    variants = [*claim.variants, *(claim.baseline if isinstance(claim.baseline, tuple) else ())]
    for kind, names, known in (("task", claim.tasks, [*study.tasks]), ("variant", variants, [*study.variants])):
        yield from (f"no {kind} {name} here{nearest(name, known)}" for name in names if name not in known)
    for task in filter(study.tasks.__contains__, claim.tasks):
        data = study.tasks[task].data
        yield from (f"{variant} is not trained on {task} here" for variant in variants if variant not in variants_on(study, task))
        for multiple in itertools.chain(claim.multiples, filter(None, [claim.baseline_multiple])):
            if multiple not in data.multiples:
                yield f"no multiple {multiple:g} of {task} here; there are {', '.join(f'{known:g}' for known in data.multiples)}"
        if not (claim.metric is None or claim.metric in METRICS[data.goal] or OF_A_LAYER.fullmatch(claim.metric)):
            yield f"no {claim.metric} of {task}{nearest(claim.metric, METRICS[data.goal])}"


def _too_few(claim: Claim, study: Study) -> Iterator[str]:
    if len(study.seeds) < claim.min_seeds:
        yield f"{len(study.seeds)} of {claim.min_seeds} seeds here"
