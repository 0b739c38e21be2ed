"""Effects with their intervals and p values (docs/statistics.md).

difference         two means over seeds and test sequences, by Student's t
bootstrap          the same, by resampling seeds and test sequences
share              seeds that solve a task: the interval of Clopper and Pearson, the exact binomial test
share_difference   two such shares: Fisher's exact test
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from pipeline.config.claims import LEVEL

RESAMPLES = 2000
ROUNDING = 1e-12
"""A smaller standard error is rounding error: nothing varies."""
Floats = NDArray[np.floating[Any]]


class Sample(NamedTuple):
    """The metric of a variant at a length."""

    seeds: Floats
    """Shape (seeds,)."""
    resampled: Floats
    """Shape (RESAMPLES, seeds): the metric in each resample of the test sequences, the same resamples for all seeds."""
    sequences: int
    """Number of sequences; 0 if the metric is no mean over sequences."""


class Count(NamedTuple):
    """Seeds that solve a task, of all; for a construction test sequences. Floats, so that nan is a missing count."""

    solved: float
    of: float


class Effect(NamedTuple):
    """An effect, its 95 % interval, and the p values of effects above and below a threshold; nan if nothing was tested."""

    value: float
    low: float
    high: float
    p_above: float = math.nan
    p_below: float = math.nan


@functools.lru_cache(maxsize=16)
def sequence_counts(sequences: int, length: int) -> Floats:
    """Number of times that each resample contains each sequence, shape (RESAMPLES, sequences)."""
    rng = np.random.default_rng([sequences, length])
    return rng.multinomial(sequences, np.full(sequences, 1 / sequences), size=RESAMPLES).astype(float)


def difference(sides: list[Sample], threshold: float, *, paired: bool, number: float) -> Effect:
    """The mean of the first side minus that of the second, or minus `number`; `paired` if both sides have the same seeds."""
    effect = _effect(sides, number)
    error, freedom = _error(sides, paired=paired)
    if error <= ROUNDING:
        return Effect(effect, effect, effect)
    student, beyond = stats.t(freedom), (effect - threshold) / error
    half = error * student.isf(LEVEL / 2)
    return Effect(effect, effect - half, effect + half, student.sf(beyond), student.cdf(beyond))


def bootstrap(sides: list[Sample], threshold: float, *, paired: bool, number: float) -> Effect:
    """The effect of `difference`, by a hierarchical bootstrap: each resample draws seeds, and test sequences for all of them.

    Few seeds make such an interval too short, so the drawn deviations between seeds are widened: from n draws of n values to an
    unbiased variance, and from the normal quantile to Student's.
    """
    effect = _effect(sides, number)
    matrices = [side.resampled for side in sides]
    if paired:
        matrices = [matrices[0] - matrices[1]]
    drawn = [_with_seeds_drawn(matrix, side) for side, matrix in enumerate(matrices)]
    distribution = drawn[0] - (drawn[1] if len(drawn) > 1 else number)
    if distribution.std() <= ROUNDING:
        return Effect(effect, effect, effect)
    low, high = np.quantile(distribution, [LEVEL / 2, 1 - LEVEL / 2])
    p_above, p_below = (
        (1 + count) / (RESAMPLES + 1) for count in ((distribution <= threshold).sum(), (distribution >= threshold).sum())
    )
    return Effect(effect, float(low), float(high), float(p_above), float(p_below))


def _with_seeds_drawn(resampled: Floats, side: int) -> Floats:
    """The mean over drawn seeds in each resample, shape (RESAMPLES,)."""
    n = resampled.shape[1]
    picks = np.random.default_rng([n, side]).integers(n, size=resampled.shape)
    center = resampled.mean(1)
    wider = math.sqrt(n / (n - 1)) * stats.t.isf(LEVEL / 2, n - 1) / stats.norm.isf(LEVEL / 2)
    return center + wider * (np.take_along_axis(resampled, picks, 1).mean(1) - center)


def share(count: Count, threshold: float) -> Effect:
    """The share of a count."""
    low, high = share_interval(count)
    p_above, p_below = (stats.binomtest(*map(int, count), threshold, side).pvalue for side in ("greater", "less"))
    return Effect(count.solved / count.of, low, high, p_above, p_below)


def share_interval(count: Count) -> tuple[float, float]:
    """The interval of Clopper and Pearson."""
    interval = stats.binomtest(*map(int, count)).proportion_ci(1 - LEVEL, method="exact")
    return float(interval.low), float(interval.high)


def share_difference(variant: Count, baseline: Count) -> Effect:
    """The share of the variant minus that of the baseline, and Fisher's test of a difference from 0.

    The interval combines those of both shares (Newcombe's square-and-add), so it is wider than Fisher's test needs.
    """
    counts = variant, baseline
    first, second = (count.solved / count.of for count in counts)
    (low_1, high_1), (low_2, high_2) = map(share_interval, counts)
    table = [[count.solved, count.of - count.solved] for count in counts]
    p_above, p_below = (float(stats.fisher_exact(table, side).pvalue) for side in ("greater", "less"))
    down, up = math.hypot(first - low_1, high_2 - second), math.hypot(high_1 - first, second - low_2)
    return Effect(first - second, first - second - down, first - second + up, p_above, p_below)


def _effect(sides: list[Sample], number: float) -> float:
    return float(sides[0].seeds.mean() - (sides[1].seeds.mean() if len(sides) > 1 else number))


def _error(sides: list[Sample], *, paired: bool) -> tuple[float, float]:
    """The standard error of the effect over seeds and test sequences, and its degrees of freedom."""
    seeds = [sides[0].seeds - sides[1].seeds] if paired else [side.seeds for side in sides]
    resampled = sides[0].resampled.mean(1) - (sides[1].resampled.mean(1) if len(sides) > 1 else 0)
    parts = [(values.var(ddof=1) / len(values), len(values) - 1) for values in seeds]
    parts.append((resampled.var(ddof=1), max(min(side.sequences for side in sides) - 1, 1)))  # at least 1: the variance is 0 then
    squared = sum(variance for variance, _ in parts)
    if not squared:
        return 0.0, math.nan
    return math.sqrt(squared), squared**2 / sum(variance**2 / freedom for variance, freedom in parts)
