"""verdicts/: every claim of claims.yaml supported, contradicted or undecided by the results, and why.

An effect is the mean over seeds of the variant's metric less that of the other side. One standard error is behind its interval
and its test, so that they agree: squared, it is the variance of each side's mean over seeds (between two lengths of one variant,
that of the mean of the seeds' differences) plus, where the metric is the one that stands for the task, the effect's variance over
resamples of the test sequences, which all seeds and variants share. Both are by Student's t, with the degrees of freedom of Welch
and Satterthwaite, for seeds that vary about as a normal distribution does; an interval may reach past what the metric can be.
What differs from seed to seed in which sequences are answered counts in both terms, which errs on the wide side. A comparison is
not tested where no seed and no sequence differs: its interval is a point and its verdict that of the number, which says nothing
about seeds or sequences not seen.

A claim is supported where all of its comparisons are, contradicted where one of them is. Its two p values are the largest for it,
and the smallest against it times the number of comparisons. Those for claims are corrected for all claims (Benjamini and
Yekutieli), and so, apart from them, are those against: of what is called supported, and of what is called contradicted, a share
of LEVEL at most is expected to be called so wrongly.
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
from pipeline.config.study import Study
from pipeline.reporting.verdicts import ABSENT
from pipeline.storage.files import atomic_write
from pipeline.storage.paths import SCORES, VERDICTS
from pipeline.storage.results import PRIMARY, read_results
from pipeline.storage.tables import CLAIM_COLUMNS, COMPARISON_COLUMNS, read_arrays

LEVEL = 0.05
"""What the false discovery rate of verdicts of a kind is held to; one less the nominal coverage of an interval."""
RESAMPLES = 2000
ROUNDING = 1e-12
"""A smaller standard error is one of arithmetic: nothing varies."""
Verdict = Literal["supported", "contradicted", "undecided"]
Floats = NDArray[np.floating[Any]]


class Side(NamedTuple):
    """A variant at a length."""

    variant: str
    multiple: float


class Sample(NamedTuple):
    """What was measured of a side: the metric by seed, and its mean over seeds in each resample of the test sequences."""

    seeds: Floats
    resampled: Floats
    sequences: int
    """How many there are; 0 where the metric is no mean over sequences."""


class Comparison(NamedTuple):
    """A variant against the other side, and what the results say of it."""

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
    """Of an effect as large if the claim were not true of it; nan where no seed and no sequence differs: it is not tested."""
    p_against: float = math.nan
    seeds: int = 0
    """The fewer of the two sides."""
    verdict: Verdict = "undecided"
    reason: str = ""


class Evidence:
    """The results of a study: metrics by seed, and what the primary ones are means of, sequence by sequence."""

    def __init__(self, study: Study, results: pd.DataFrame, sequences: Mapping[str, Mapping[str, Floats]]):
        self.study, self.sequences = study, sequences
        keys = ["task", "metric", "variant", "length"]
        by_seed = results.sort_values("seed").groupby(keys, sort=False)["value"]
        self.values: dict[Any, Floats] = {key: values.to_numpy(float) for key, values in by_seed}

    @classmethod
    def read(cls, study: Study) -> Evidence:
        """From the files. Raises ValueError where a cell of the study has no results."""
        sequences = {}
        for task in study.tasks:
            sequences[task] = {name: array.astype(float) for name, array in read_arrays(SCORES / f"{task}.npz").items()}
        return cls(study, read_results(study), sequences)

    def sample(self, task: str, metric: str, variant: str, length: int) -> Sample:
        """The sequences are drawn anew RESAMPLES times, the same ones for all seeds and variants of a length."""
        values, sequences = self.values[task, metric, variant, length], 0
        draws = np.tile(values, (RESAMPLES, 1))
        if metric == PRIMARY[self.study.tasks[task].data.goal]:
            for place, seed in enumerate(sorted(self.study.seeds)):
                columns = self.sequences.get(task, {}).get(f"{variant}/{seed}/{length}")
                if columns is not None:
                    sequences = columns.shape[1]
                    counts = _counts(sequences, length)
                    draws[:, place] = (counts @ columns[0]) / (counts @ columns[1])
        return Sample(values, draws.mean(1), sequences)


@functools.lru_cache(maxsize=16)
def _counts(sequences: int, length: int) -> Floats:
    """How often each sequence is drawn in each resample."""
    rng = np.random.default_rng([sequences, length])
    return rng.multinomial(sequences, np.full(sequences, 1 / sequences), size=RESAMPLES).astype(float)


def judge(study: Study, claims: dict[str, Claim]) -> None:
    """Writes verdicts/: comparisons.csv, and claims.csv with a row a claim."""
    evidence = Evidence.read(study)
    comparisons = {name: list(compare(evidence, name, claim)) for name, claim in claims.items()}
    verdicts = decide(claims, comparisons)
    with atomic_write(VERDICTS) as folder:
        folder.mkdir()
        rows = itertools.chain.from_iterable(comparisons.values())
        for name, table in (("comparisons", pd.DataFrame(rows, columns=[*COMPARISON_COLUMNS])), ("claims", verdicts)):
            table.to_csv(folder / f"{name}.csv", index=False, lineterminator="\n", float_format="%.6g")


def compare(evidence: Evidence, name: str, claim: Claim) -> Iterator[Comparison]:
    """Every comparison that the claim is made of."""
    tasks = evidence.study.tasks
    others: tuple[str | float | None, ...] = claim.baseline if isinstance(claim.baseline, tuple) else (claim.baseline,)
    for task, multiple, variant, other in itertools.product(claim.tasks, claim.multiples, claim.variants, others):
        section = tasks.get(task)
        lengths = dict(zip(section.data.multiples, section.data.lengths, strict=True)) if section else {}
        metric = claim.metric or (PRIMARY[section.data.goal] if section else "")
        rival: Side | None = None
        if isinstance(other, float):
            than = f"{other:g}"
        elif isinstance(other, str):
            than, rival = other, Side(other, multiple)
        else:
            assert claim.baseline_multiple is not None
            than, rival = f"itself at {claim.baseline_multiple:g}x", Side(variant, claim.baseline_multiple)
        blank = Comparison(name, task, metric, lengths.get(multiple, 0), variant, than)
        sides = [Side(variant, multiple), *([rival] if rival else [])]
        keys = [(task, metric, side.variant, lengths.get(side.multiple, 0)) for side in sides]
        if faults := [fault for side, key in zip(sides, keys, strict=True) if (fault := _gap(evidence, claim, side, key))]:
            yield blank._replace(reason=faults[0])
            continue
        samples = [evidence.sample(*key) for key in keys]
        number = other if isinstance(other, float) else 0.0
        yield _measured(blank, claim, samples, paired=claim.baseline_multiple is not None, number=number)


def _gap(evidence: Evidence, claim: Claim, side: Side, key: tuple[str, str, str, int]) -> str | None:
    """Why nothing can be said of a side, in words."""
    task, metric, _, length = key
    values = evidence.values.get(key)
    if not length or values is None:
        return f"{ABSENT} {metric or 'score'} of {side.variant} on {task} at {side.multiple:g}x"
    if np.isnan(values).any():
        return f"{side.variant} diverged on {task} with {np.isnan(values).sum()} of {len(values)} seeds"
    return f"too few seeds: {len(values)} of {claim.min_seeds}" if len(values) < claim.min_seeds else None


def _measured(blank: Comparison, claim: Claim, sides: list[Sample], *, paired: bool, number: float) -> Comparison:
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
        reason="" if holds or fails else "interval across the threshold",
    )


def _error(sides: list[Sample], *, paired: bool) -> tuple[float, float]:
    """The standard error of the effect over seeds and test sequences, and its degrees of freedom."""
    seeds = [sides[0].seeds - sides[1].seeds] if paired else [side.seeds for side in sides]
    resampled = sides[0].resampled - (sides[1].resampled if len(sides) > 1 else 0)
    parts = [(values.var(ddof=1) / len(values), len(values) - 1) for values in seeds]
    parts.append((resampled.var(ddof=1), max(min(side.sequences for side in sides) - 1, 1)))  # of one sequence or none it is 0
    squared = sum(variance for variance, _ in parts)
    if not squared:
        return 0.0, math.nan
    return math.sqrt(squared), squared**2 / sum(variance**2 / freedom for variance, freedom in parts)


def decide(claims: dict[str, Claim], comparisons: dict[str, list[Comparison]]) -> pd.DataFrame:
    """A row a claim: its verdict, with the comparison that decides it or is furthest from doing so."""
    families = {name: _p_values(rows) for name, rows in comparisons.items()}
    p: dict[tuple[str, int], float] = {}
    for side in (0, 1):
        known = [(name, side) for name, pair in families.items() if not math.isnan(pair[side])]
        corrected = stats.false_discovery_control([families[name][side] for name, _ in known], method="by") if known else []
        p |= zip(known, map(float, corrected), strict=True)
    rows = []
    for name, claim in claims.items():
        here = comparisons[name]
        p_for, p_against = (p.get((name, side), math.nan) for side in (0, 1))
        verdict, row, reason = _verdict(claim, here, p_for, p_against)
        rows.append(
            {
                "claim": name, "statement": claim.statement, "source": claim.source, "verdict": verdict, "reason": reason,
                "effect": row.effect, "low": row.low, "high": row.high, "p": p_against if verdict == "contradicted" else p_for,
                "seeds": row.seeds, "comparisons": len(here), "ablation": claim.ablation,
            }
        )  # fmt: skip
    return pd.DataFrame(rows, columns=[*CLAIM_COLUMNS])


def _p_values(rows: list[Comparison]) -> tuple[float, float]:
    """For the claim and against it; nan where nothing was tested, and for it where a comparison could not be made."""
    tested = [row for row in rows if not math.isnan(row.p_for)]
    if not tested:
        return math.nan, math.nan
    decidable = not any(math.isnan(row.effect) for row in rows)
    against = min(row.p_against for row in tested)
    return max(row.p_for for row in tested) if decidable else math.nan, min(1.0, against * len(rows))


def _verdict(claim: Claim, rows: list[Comparison], p_for: float, p_against: float) -> tuple[Verdict, Comparison, str]:
    """The verdict, the comparison that it is shown by, and the reason in words."""

    def margin(row: Comparison) -> float:
        return claim.sign * (row.effect - claim.threshold)

    def place(row: Comparison) -> str:
        return f"{row.variant} against {row.baseline} on {row.task} at length {row.length}"

    measured = [row for row in rows if row.seeds and not math.isnan(row.effect)]
    worst = min(measured, key=margin, default=rows[0])
    lost = [row for row in measured if row.verdict == "contradicted"]
    # A contradiction in which no seed and no sequence differs is not tested, and stands by itself.
    if lost and (not p_against > LEVEL or any(math.isnan(row.p_against) for row in lost)):
        worst = min(lost, key=margin)
        share = "" if len(lost) == len(rows) else f"; {len(lost)} of {len(rows)} comparisons"
        return "contradicted", worst, place(worst) + share
    gaps = [row.reason for row in rows if math.isnan(row.effect)]
    if gaps:
        return "undecided", worst, gaps[0]
    open_ones = [row for row in rows if row.verdict != "supported"]
    if open_ones:
        first = min(open_ones, key=margin)
        return "undecided", first, f"{first.reason}: {place(first)}"
    if p_for > LEVEL:
        least_sure = max((row for row in rows if not math.isnan(row.p_for)), key=lambda row: row.p_for)
        return "undecided", least_sure, f"not significant once corrected for all claims: {place(least_sure)}"
    return "supported", worst, f"smallest: {place(worst)}" if len(rows) > 1 else place(worst)
