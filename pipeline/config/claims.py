"""The schema and the rules of claims.yaml. Importing it does not import torch."""

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
from pipeline.config.grid import seeds_of, variants_on
from pipeline.config.names import LINE, Name
from pipeline.config.outputs import COST
from pipeline.config.study import Study
from pipeline.config.yaml_file import read_yaml

FILE = Path("claims.yaml")
RECALL = ("recalled_share", "recalled_rare_share", "loss_recalled", "loss_recalled_rare", "loss_others")
METRICS = {
    "accuracy": ("accuracy", "sequence_accuracy", "loss"),
    "loss": ("bits_per_byte", "loss", "perplexity", "word_perplexity", "accuracy", *RECALL),
}
"""The metrics of a task, by its goal. Each layer adds LAYER_METRIC."""
LAYER_METRIC = re.compile(r"attention_(entropy|on_answer)_[1-9]\d*")
PART_METRIC = re.compile(r"accuracy_[a-z0-9_]+")
"""The accuracy of a part of a task (`part_names`)."""
SHOWN = 5
"""Up to this many undecidable claims are reported with their reasons, more only by name."""
Multiple = Annotated[float, Field(gt=0)]
Names = Annotated[tuple[Name, ...], Field(min_length=1, strict=False)]


class Claim(Config):
    """A statement and its test. It holds if the effect is beyond `threshold` for every task, length and pair of variants."""

    renamed_keys: ClassVar = {
        "says": "statement", "than": "baseline", "than_multiple": "baseline_multiple", "by": "margin", "direction": "test",
        "seeds": "min_seeds", "figure": "ablation",
    }  # fmt: skip
    statement: Annotated[str, Field(pattern=LINE)]
    source: Literal["paper", "ours"]
    tasks: Names
    multiples: Annotated[tuple[Multiple, ...], Field(min_length=1, strict=False)]
    metric: Name | None = None
    """A metric of results/<task>.csv; if None, the main metric of the task."""
    variants: Names
    baseline: Names | float | None = None
    """What `variants` are compared with: other variants, or a number."""
    baseline_multiple: Multiple | None = None
    """Compare each variant with itself at this length instead."""
    test: Literal["superior", "inferior", "non_inferior", "non_superior"]
    margin: Annotated[float, Field(ge=0)]
    """The smallest relevant difference, in units of the metric."""
    min_seeds: Annotated[Count, Field(ge=2)]
    """With fewer seeds the claim stays undecided."""
    ablation: Name
    """The ablation whose figure shows the claim, or `cost`."""

    @model_validator(mode="after")
    def _check_keys(self) -> Self:
        if (self.baseline is None) == (self.baseline_multiple is None):
            raise ValueError("needs exactly one of baseline (variants or a number) and baseline_multiple (a length)")
        if isinstance(self.baseline, tuple) and (both := set(self.variants) & set(self.baseline)):
            raise ValueError(f"{min(both)!r} is in both variants and baseline")
        if self.baseline_multiple in self.multiples:
            raise ValueError(f"baseline_multiple = {self.baseline_multiple:g} is also in multiples")
        for key in ("tasks", "multiples", "variants", "baseline"):
            values = getattr(self, key)
            if isinstance(values, tuple) and (twice := {value for value in values if values.count(value) > 1}):
                raise ValueError(f"{key} contains {min(twice)!r} twice")
        return self

    @property
    def sign(self) -> int:
        """1 if the claim needs effects above `threshold`, -1 if it needs effects below."""
        return 1 if self.test in ("superior", "non_inferior") else -1

    @property
    def threshold(self) -> float:
        return self.margin if self.test in ("superior", "non_superior") else -self.margin


def load(path: Path = FILE) -> dict[str, Claim]:
    """Load the claims by name; none if the file does not exist. Raises ParamsError listing every error."""
    if not path.exists():
        return {}
    raw = read_yaml(path)
    claims: dict[str, Claim] = parse_config(dict[Name, Claim], {} if raw is None else raw, path)
    return claims


def check(claims: dict[str, Claim], study: Study) -> None:
    """Check the ablation and the metric of each claim. Raises ParamsError.

    A claim that the study cannot decide may name an ablation that the study does not have: claims are about several studies.
    """
    metrics = {metric for of_goal in METRICS.values() for metric in of_goal} | {"attention_entropy_1", "attention_on_answer_1"}
    errors = []
    for name, claim in claims.items():
        if claim.ablation not in (*study.ablations, COST) and not any(_missing_from(claim, study)):
            known = nearest(claim.ablation, [*study.ablations, COST])
            errors.append(f"{name}.ablation = {json.dumps(claim.ablation)}: must be an ablation or {COST}{known}")
        of_some = claim.metric is None or LAYER_METRIC.fullmatch(claim.metric) or PART_METRIC.fullmatch(claim.metric)
        if not (of_some or claim.metric in metrics):
            known = nearest(claim.metric, sorted(metrics)) or f"; known are {', '.join(sorted(metrics))}"
            errors.append(f"{name}.metric = {json.dumps(claim.metric)}: unknown metric{known}")
    if errors:
        raise config_error(FILE, errors)


def undecided(claims: dict[str, Claim], study: Study) -> Iterator[str]:
    """Yield the claims that this study cannot decide: one line per claim with its reason, or one line for more than SHOWN."""
    first_reason = (
        (name, next(itertools.chain(_missing_from(claim, study), _too_few_seeds(claim, study)), None))
        for name, claim in claims.items()
    )
    reasons = {name: reason for name, reason in first_reason if reason}
    if len(reasons) == len(claims) > SHOWN:
        yield f"this study can decide none of the {len(claims)} claims"
    elif len(reasons) > SHOWN:
        yield f"this study cannot decide {len(reasons)} of {len(claims)} claims: {', '.join(reasons)}"
    else:
        yield from (f"{name}: {reason}" for name, reason in reasons.items())


def _missing_from(claim: Claim, study: Study) -> Iterator[str]:
    """Yield what the claim needs and the study does not have."""
    variants = [*claim.variants, *(claim.baseline if isinstance(claim.baseline, tuple) else ())]
    for kind, names, known in (("task", claim.tasks, [*study.tasks]), ("variant", variants, [*study.variants])):
        yield from (f"this study has no {kind} {name}{nearest(name, known)}" for name in names if name not in known)
    for task in filter(study.tasks.__contains__, claim.tasks):
        data = study.tasks[task].data
        trained = variants_on(study, task)
        yield from (f"this study does not train {variant} on {task}" for variant in variants if variant not in trained)
        for multiple in itertools.chain(claim.multiples, filter(None, [claim.baseline_multiple])):
            if multiple not in data.multiples:
                yield f"task {task} has no multiple {multiple:g}, only {', '.join(f'{known:g}' for known in data.multiples)}"
        metrics = (*METRICS[data.goal], *(f"accuracy_{name}" for name in data.part_names))
        if not (claim.metric is None or claim.metric in metrics or LAYER_METRIC.fullmatch(claim.metric)):
            yield f"task {task} has no metric {claim.metric}{nearest(claim.metric, metrics)}"


def _too_few_seeds(claim: Claim, study: Study) -> Iterator[str]:
    variants = [*claim.variants, *(claim.baseline if isinstance(claim.baseline, tuple) else ())]
    counts = [len(seeds_of(study, task, variant)) for task in claim.tasks for variant in variants]
    if min(counts) < claim.min_seeds:
        yield f"this study has {min(counts)} seeds, fewer than min_seeds = {claim.min_seeds}"
