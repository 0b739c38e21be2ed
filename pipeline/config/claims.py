"""The schema and the rules of claims.yaml. Importing it does not import torch."""

from __future__ import annotations

import datetime
import itertools
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from cat.config import Config, Count
from cat.mixers.registry import ConstructionConfig
from pipeline.config.errors import config_error, nearest, parse_config
from pipeline.config.grid import judged_seeds, variants_on
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


SHARE_TESTS = ("solved", "unsolved")
"""Tests of the share of seeds that solve a task, against the number `share`."""
COUNT_TESTS = (*SHARE_TESTS, "solved_more", "solved_less")
"""Tests that count seeds; the others compare means over seeds."""
COUNTABLE = ("accuracy", "sequence_accuracy")
"""The metrics by which a seed can solve a task."""
SOLVED_AT = 0.99
"""Accuracy from which a seed has solved a task, unless the claim sets `solved_at`."""
SHARE = 0.5
"""`share` of a claim that does not set it."""
LEVEL = 0.05
"""One minus the coverage of an interval; bound of the false discovery rate per kind of verdict."""


class Revision(Config):
    """A change of a claim after its first registration."""

    date: datetime.date
    reason: Annotated[str, Field(pattern=LINE)]
    was: Annotated[str, Field(pattern=LINE)]
    """The earlier statement, or the earlier value of a key."""
    verdict: Literal["supported", "contradicted", "undecided"]
    """Verdict of the earlier claim."""


class Claim(Config):
    """A statement and its test. It holds if the effect is beyond `threshold` for every task, length and pair of variants."""

    renamed_keys: ClassVar = {
        "says": "statement", "than": "baseline", "than_multiple": "baseline_multiple", "by": "margin", "direction": "test",
        "seeds": "min_seeds", "figure": "ablation",
    }  # fmt: skip
    statement: Annotated[str, Field(pattern=LINE)]
    source: Literal["paper", "ours", "others"]
    """Who claims it: the paper of CAT, this study, or the paper of another layer."""
    registered: datetime.date
    """The day on which the claim was written down."""
    revised: Annotated[tuple[Revision, ...], Field(strict=False)] = ()
    """Later changes of the statement or the test, oldest first."""
    tasks: Names
    multiples: Annotated[tuple[Multiple, ...], Field(min_length=1, strict=False)]
    metric: Name | None = None
    """A metric of results/<task>.csv; if None, the main metric of the task."""
    variants: Names
    baseline: Names | float | None = None
    """What `variants` are compared with: other variants, or a number."""
    baseline_multiple: Multiple | None = None
    """Compare each variant with itself at this length instead."""
    test: Literal["superior", "inferior", "non_inferior", "non_superior", "solved", "unsolved", "solved_more", "solved_less"]
    """Compare means, compare the share of seeds that solve the task with `share`, or compare two such shares."""
    margin: Annotated[float, Field(ge=0)] | None = None
    """The smallest relevant difference of means, in units of the metric."""
    share: Annotated[float, Field(gt=0, lt=1)] | None = None
    """`solved`: more than this share of the seeds solves the task; `unsolved`: less. SHARE if None."""
    solved_at: Annotated[float, Field(gt=0, le=1)] = SOLVED_AT
    """The accuracy from which a seed counts as solving the task."""
    min_seeds: Annotated[Count, Field(ge=2)]
    """With fewer seeds the claim stays undecided."""
    ablation: Name
    """The ablation whose figure shows the claim, or `cost`."""

    @model_validator(mode="after")
    def _check_dates(self) -> Self:
        today = datetime.datetime.now(datetime.UTC).date()
        dates = [("registered", self.registered), *(("revised.date", revision.date) for revision in self.revised)]
        for (_, earlier), (key, date) in itertools.pairwise([dates[0], *dates]):
            if date < earlier:
                raise ValueError(f"{key} = {date} is before {earlier}, the date of the wording that it changes")
            if date > today:
                raise ValueError(f"{key} = {date} is in the future")
        return self

    @model_validator(mode="after")
    def _check_test(self) -> Self:
        """Each test has the keys that it uses and no other."""
        counts = self.test in COUNT_TESTS
        if counts == (self.margin is not None):
            raise ValueError(f"test = {self.test} {'has no margin' if counts else 'needs a margin'}")
        if self.share is not None and self.test not in SHARE_TESTS:
            raise ValueError(f"share is only for test = {' or '.join(SHARE_TESTS)}, not for {self.test}")
        if "solved_at" in self.model_fields_set and not counts:
            raise ValueError(f"solved_at is only for test = {', '.join(COUNT_TESTS)}, not for {self.test}")
        if counts and self.metric not in (None, *COUNTABLE):
            raise ValueError(f"test = {self.test} counts seeds by metric = {' or '.join(COUNTABLE)}, not {self.metric}")
        return self

    @model_validator(mode="after")
    def _check_keys(self) -> Self:
        if self.test in SHARE_TESTS:
            if not (self.baseline is None and self.baseline_multiple is None):
                raise ValueError(f"test = {self.test} has no baseline: it compares with share")
        elif self.test in COUNT_TESTS:
            if not isinstance(self.baseline, tuple) or self.baseline_multiple is not None:
                raise ValueError(f"test = {self.test} needs variants as its baseline")
        elif (self.baseline is None) == (self.baseline_multiple is None):
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
        return 1 if self.test in ("superior", "non_inferior", "solved", "solved_more") else -1

    @property
    def threshold(self) -> float:
        if self.test in COUNT_TESTS:
            return (SHARE if self.share is None else self.share) if self.test in SHARE_TESTS else 0.0
        assert self.margin is not None
        return self.margin if self.test in ("superior", "non_superior") else -self.margin

    @property
    def fewest_seeds(self) -> int:
        """Seeds without which no result supports the claim, by `min_seeds` and by the exact test of a share."""
        if self.test not in SHARE_TESTS:
            return self.min_seeds
        most = self.threshold if self.sign > 0 else 1 - self.threshold
        return max(self.min_seeds, math.ceil(math.log(LEVEL / 2) / math.log(most)))


def unrevised(before: dict[str, Claim], after: dict[str, Claim]) -> list[str]:
    """The claims that differ between two versions of claims.yaml in what they say or test, without a new entry in `revised`."""

    def tested(claim: Claim) -> dict[str, object]:
        return claim.model_dump(exclude={"revised", "ablation", "source"})

    both = [name for name in after if name in before]
    return [n for n in both if tested(before[n]) != tested(after[n]) and len(after[n].revised) <= len(before[n].revised)]


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
        if claim.test in COUNT_TESTS and data.goal != "accuracy":
            yield f"test = {claim.test} needs a task with an accuracy, and {task} is none"


def _too_few_seeds(claim: Claim, study: Study) -> Iterator[str]:
    variants = [*claim.variants, *(claim.baseline if isinstance(claim.baseline, tuple) else ())]
    # A construction has no seeds: its test sequences are counted.
    trained = [name for name in variants if not isinstance(study.variants[name], ConstructionConfig)]
    counts = [len(judged_seeds(study, task, variant)) for task in claim.tasks for variant in trained]
    if not counts or min(counts) >= claim.fewest_seeds:
        return
    needed = "min_seeds =" if claim.fewest_seeds == claim.min_seeds else f"test = {claim.test} needs:"
    yield f"this study has {min(counts)} seeds, fewer than {needed} {claim.fewest_seeds}"
