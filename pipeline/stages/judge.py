"""Write verdicts/: each claim of claims.yaml is supported, contradicted or undecided by the results, with a reason.

An effect is the variant's mean metric over seeds minus that of the baseline. Its interval and its test use the same standard
error, so they agree. The squared standard error is the sum of

    the variance of each side's mean over seeds; for two lengths of one variant, of the mean of the paired differences
    the variance of the effect over resamples of the test sequences, which all seeds and variants share
        (only for the primary metric of the task)

The interval and the test use Student's t with the degrees of freedom of Welch and Satterthwaite, so they assume that seeds vary
about as a normal distribution does. An interval may exceed the range of the metric. Both terms contain the differences between
seeds in which sequences they answer correctly, so the standard error is rather too large. If no seed and no sequence differs,
nothing is tested: the interval is a point, the number decides the verdict, and this says nothing about other seeds or sequences.

A claim is supported if all its comparisons are, contradicted if one of them is. Its p value for the claim is the largest of its
comparisons. Its p value against the claim is the smallest times the number of comparisons. The p values for all claims are
corrected together (Benjamini and Yekutieli), and separately those against them: of the supported claims, and of the
contradicted ones, at most a share of LEVEL is expected to be wrong.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from pipeline.config.claims import Claim
from pipeline.config.grid import seeds_of
from pipeline.config.study import Study
from pipeline.reporting.verdicts import ABSENT
from pipeline.storage.files import atomic_write
from pipeline.storage.paths import SCORES, VERDICTS
from pipeline.storage.results import read_results
from pipeline.storage.tables import CLAIM_COLUMNS, COMPARISON_COLUMNS, PRIMARY, read_arrays

LEVEL = 0.05
"""Bound of the false discovery rate per kind of verdict; one minus the nominal coverage of an interval."""
RESAMPLES = 2000
ROUNDING = 1e-12
"""A smaller standard error is rounding error: nothing varies."""
Verdict = Literal["supported", "contradicted", "undecided"]
Floats = NDArray[np.floating[Any]]


class Side(NamedTuple):
    """A variant at a length."""

    variant: str
    multiple: float


class Sample(NamedTuple):
    """The metric of a side by seed, and its mean over seeds in each resample of the test sequences."""

    seeds: Floats
    resampled: Floats
    sequences: int
    """Number of sequences; 0 if the metric is no mean over sequences."""


class Comparison(NamedTuple):
    """One variant against one baseline, with the result."""

    claim: str
    task: str
    metric: str
    length: int
    variant: str
    baseline: str
    effect: float = math.nan
    low: float = math.nan
    high: float = math.nan
    p_for: float = math.nan
    """Probability of an effect at least this large if the claim is false; nan if no seed and no sequence differs."""
    p_against: float = math.nan
    seeds: int = 0
    """The smaller number of the two sides."""
    verdict: Verdict = "undecided"
    reason: str = ""


class Evidence:
    """The results of a study: metrics by seed, and the scores per sequence behind the primary ones."""

    def __init__(self, study: Study, results: pd.DataFrame, sequences: Mapping[str, Mapping[str, Floats]]):
        self.study, self.sequences = study, sequences
        keys = ["task", "metric", "variant", "length"]
        by_seed = results.sort_values("seed").groupby(keys, sort=False)["value"]
        self.values: dict[Any, Floats] = {key: values.to_numpy(float) for key, values in by_seed}

    @classmethod
    def read(cls, study: Study) -> Evidence:
        """Read the files. Raises ValueError if a cell of the study has no results."""
        sequences = {}
        for task in study.tasks:
            sequences[task] = {name: array.astype(float) for name, array in read_arrays(SCORES / f"{task}.npz").items()}
        return cls(study, read_results(study), sequences)

    def sample(self, task: str, metric: str, variant: str, length: int) -> Sample:
        """Draw RESAMPLES samples of the sequences, the same ones for all seeds and variants of a length."""
        values, sequences = self.values[task, metric, variant, length], 0
        draws = np.tile(values, (RESAMPLES, 1))
        if metric == PRIMARY[self.study.tasks[task].data.goal]:
            for index, seed in enumerate(sorted(seeds_of(self.study, task, variant))):
                columns = self.sequences.get(task, {}).get(f"{variant}/{seed}/{length}")
                if columns is not None:
                    sequences = columns.shape[1]
                    counts = _counts(sequences, length)
                    draws[:, index] = (counts @ columns[0]) / (counts @ columns[1])
        return Sample(values, draws.mean(1), sequences)


@functools.lru_cache(maxsize=16)
def _counts(sequences: int, length: int) -> Floats:
    """Number of times that each resample contains each sequence."""
    rng = np.random.default_rng([sequences, length])
    return rng.multinomial(sequences, np.full(sequences, 1 / sequences), size=RESAMPLES).astype(float)


def judge(study: Study, claims: dict[str, Claim]) -> None:
    """Write verdicts/comparisons.csv and verdicts/claims.csv."""
    evidence = Evidence.read(study)
    comparisons = {name: list(compare(evidence, name, claim)) for name, claim in claims.items()}
    verdicts = decide(claims, comparisons)
    with atomic_write(VERDICTS) as folder:
        folder.mkdir()
        rows = itertools.chain.from_iterable(comparisons.values())
        for name, table in (("comparisons", pd.DataFrame(rows, columns=[*COMPARISON_COLUMNS])), ("claims", verdicts)):
            table.to_csv(folder / f"{name}.csv", index=False, lineterminator="\n", float_format="%.6g")


def compare(evidence: Evidence, name: str, claim: Claim) -> Iterator[Comparison]:
    """All comparisons of the claim."""
    tasks = evidence.study.tasks
    baselines: tuple[str | float | None, ...] = claim.baseline if isinstance(claim.baseline, tuple) else (claim.baseline,)
    for task, multiple, variant, baseline in itertools.product(claim.tasks, claim.multiples, claim.variants, baselines):
        section = tasks.get(task)
        lengths = dict(zip(section.data.multiples, section.data.lengths, strict=True)) if section else {}
        metric = claim.metric or (PRIMARY[section.data.goal] if section else "")
        rival: Side | None = None
        if isinstance(baseline, float):
            baseline_name = f"{baseline:g}"
        elif isinstance(baseline, str):
            baseline_name, rival = baseline, Side(baseline, multiple)
        else:
            assert claim.baseline_multiple is not None
            baseline_name, rival = f"itself at {claim.baseline_multiple:g}x", Side(variant, claim.baseline_multiple)
        blank = Comparison(name, task, metric, lengths.get(multiple, 0), variant, baseline_name)
        sides = [Side(variant, multiple), *([rival] if rival else [])]
        keys = [(task, metric, side.variant, lengths.get(side.multiple, 0)) for side in sides]
        if faults := [fault for side, key in zip(sides, keys, strict=True) if (fault := _missing(evidence, claim, side, key))]:
            yield blank._replace(reason=faults[0])
            continue
        samples = [evidence.sample(*key) for key in keys]
        number = baseline if isinstance(baseline, float) else 0.0
        yield _compare(blank, claim, samples, paired=claim.baseline_multiple is not None, number=number)


def _missing(evidence: Evidence, claim: Claim, side: Side, key: tuple[str, str, str, int]) -> str | None:
    """Why a side cannot be compared, or None."""
    task, metric, _, length = key
    values = evidence.values.get(key)
    if not length or values is None:
        return f"{ABSENT} {metric or 'score'} of {side.variant} on {task} at {side.multiple:g}x"
    if np.isnan(values).any():
        return f"{side.variant} diverged on {task} with {np.isnan(values).sum()} of {len(values)} seeds"
    return f"too few seeds: {len(values)} of {claim.min_seeds}" if len(values) < claim.min_seeds else None


def _compare(blank: Comparison, claim: Claim, sides: list[Sample], *, paired: bool, number: float) -> Comparison:
    """The comparison with its effect, interval, p values and verdict."""
    effect = sides[0].seeds.mean() - (sides[1].seeds.mean() if len(sides) > 1 else number)
    error, freedom = _error(sides, paired=paired)
    half, p_for, p_against = 0.0, math.nan, math.nan
    if error > ROUNDING:
        student = stats.t(freedom)
        beyond = claim.sign * (effect - claim.threshold) / error
        half, p_for, p_against = error * student.isf(LEVEL / 2), student.sf(beyond), student.cdf(beyond)
    low, high = effect - half, effect + half
    above, below = low > claim.threshold, high < claim.threshold
    holds, fails = (above, below) if claim.sign > 0 else (below, above)
    return blank._replace(
        effect=effect,
        low=low,
        high=high,
        p_for=p_for,
        p_against=p_against,
        seeds=min(len(side.seeds) for side in sides),
        verdict="supported" if holds else "contradicted" if fails else "undecided",
        reason="" if holds or fails else "interval includes the threshold",
    )


def _error(sides: list[Sample], *, paired: bool) -> tuple[float, float]:
    """The standard error of the effect over seeds and test sequences, and its degrees of freedom."""
    seeds = [sides[0].seeds - sides[1].seeds] if paired else [side.seeds for side in sides]
    resampled = sides[0].resampled - (sides[1].resampled if len(sides) > 1 else 0)
    parts = [(values.var(ddof=1) / len(values), len(values) - 1) for values in seeds]
    parts.append((resampled.var(ddof=1), max(min(side.sequences for side in sides) - 1, 1)))  # at least 1: the variance is 0 then
    squared = sum(variance for variance, _ in parts)
    if not squared:
        return 0.0, math.nan
    return math.sqrt(squared), squared**2 / sum(variance**2 / freedom for variance, freedom in parts)


def decide(claims: dict[str, Claim], comparisons: dict[str, list[Comparison]]) -> pd.DataFrame:
    """One row per claim: its verdict, and the comparison that decides it or is furthest from it."""
    families = {name: _p_values(rows) for name, rows in comparisons.items()}
    p: dict[tuple[str, int], float] = {}
    for side in (0, 1):
        known = [(name, side) for name, pair in families.items() if not math.isnan(pair[side])]
        corrected = stats.false_discovery_control([families[name][side] for name, _ in known], method="by") if known else []
        p |= zip(known, map(float, corrected), strict=True)
    rows = []
    for name, claim in claims.items():
        made = comparisons[name]
        p_for, p_against = (p.get((name, side), math.nan) for side in (0, 1))
        verdict, row, reason = _verdict(claim, made, p_for, p_against)
        rows.append(
            {
                "claim": name, "statement": claim.statement, "source": claim.source, "verdict": verdict, "reason": reason,
                "effect": row.effect, "low": row.low, "high": row.high, "p": p_against if verdict == "contradicted" else p_for,
                "seeds": row.seeds, "comparisons": len(made), "ablation": claim.ablation,
            }
        )  # fmt: skip
    return pd.DataFrame(rows, columns=[*CLAIM_COLUMNS])


def _p_values(rows: list[Comparison]) -> tuple[float, float]:
    """(p for the claim, p against it): nan if nothing was tested; the first also if a comparison is missing."""
    tested = [row for row in rows if not math.isnan(row.p_for)]
    if not tested:
        return math.nan, math.nan
    decidable = not any(math.isnan(row.effect) for row in rows)
    against = min(row.p_against for row in tested)
    return max(row.p_for for row in tested) if decidable else math.nan, min(1.0, against * len(rows))


def _verdict(claim: Claim, rows: list[Comparison], p_for: float, p_against: float) -> tuple[Verdict, Comparison, str]:
    """The verdict, the comparison that shows it, and the reason in words."""

    def margin(row: Comparison) -> float:
        return claim.sign * (row.effect - claim.threshold)

    def place(row: Comparison) -> str:
        return f"{row.variant} against {row.baseline} on {row.task} at length {row.length}"

    measured = [row for row in rows if row.seeds and not math.isnan(row.effect)]
    worst = min(measured, key=margin, default=rows[0])
    against = [row for row in measured if row.verdict == "contradicted"]
    # If no seed and no sequence differs, nothing is tested, and the number alone contradicts the claim.
    if against and (not p_against > LEVEL or any(math.isnan(row.p_against) for row in against)):
        worst = min(against, key=margin)
        share = "" if len(against) == len(rows) else f"; {len(against)} of {len(rows)} comparisons"
        return "contradicted", worst, place(worst) + share
    missing = [row.reason for row in rows if math.isnan(row.effect)]
    if missing:
        return "undecided", worst, missing[0]
    unsupported = [row for row in rows if row.verdict != "supported"]
    if unsupported:
        first = min(unsupported, key=margin)
        return "undecided", first, f"{first.reason}: {place(first)}"
    if p_for > LEVEL:
        least_sure = max((row for row in rows if not math.isnan(row.p_for)), key=lambda row: row.p_for)
        return "undecided", least_sure, f"not significant after correction for all claims: {place(least_sure)}"
    return "supported", worst, f"smallest margin: {place(worst)}" if len(rows) > 1 else place(worst)
