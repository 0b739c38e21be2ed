"""Effects and intervals against scipy and known values, and the coverage of the bootstrap."""

import math

import numpy as np
import pytest
from scipy import stats

from pipeline.reporting.statistics import (
    RESAMPLES,
    Count,
    Sample,
    bootstrap,
    sequence_counts,
    share,
    share_difference,
    share_interval,
)

SEQUENCES = 64


def sample(values):
    """The sample of scores per seed and sequence."""
    weights = sequence_counts(SEQUENCES, 1) / SEQUENCES
    return Sample(values.mean(1), weights @ values.T, SEQUENCES)


@pytest.mark.parametrize(
    ("solved", "of", "low", "high"), [(3, 3, 0.292, 1), (20, 20, 0.832, 1), (9, 20, 0.231, 0.685), (0, 10, 0, 0.308)]
)
def test_the_interval_of_a_share_is_that_of_clopper_and_pearson(solved, of, low, high):
    assert share_interval(Count(solved, of)) == pytest.approx((low, high), abs=0.001)


def test_a_share_is_tested_by_the_exact_test_that_its_interval_inverts():
    low = share_interval(Count(9, 10))[0]
    assert share(Count(9, 10), low).p_above == pytest.approx(0.025)
    assert share(Count(10, 10), 0.5).p_above == pytest.approx(0.5**10)
    assert share(Count(0, 10), 0.5).p_below == pytest.approx(0.5**10)


def test_two_shares_are_compared_by_fishers_test():
    effect = share_difference(Count(10, 10), Count(4, 10))
    assert effect.value == pytest.approx(0.6)
    assert effect.p_above == pytest.approx(stats.hypergeom.sf(9, 20, 14, 10))
    assert effect.p_below == 1
    assert 0 < effect.low < 0.6 < effect.high
    mirrored = share_difference(Count(4, 10), Count(10, 10))
    assert (mirrored.low, mirrored.high, mirrored.p_below) == pytest.approx((-effect.high, -effect.low, effect.p_above))


@pytest.mark.parametrize("seeds", [3, 10])
@pytest.mark.parametrize(("between_seeds", "between_sequences"), [(1, 0.05), (0.05, 1)])
def test_the_bootstrap_covers_the_effect(seeds, between_seeds, between_sequences):
    """Seeds and sequences differ at random around an effect of 0; the plain bootstrap covers it in 75 % for three seeds."""
    rng, repeats, covered = np.random.default_rng(0), 300, 0
    for _ in range(repeats):
        values = between_seeds * rng.standard_normal((seeds, 1)) + between_sequences * rng.standard_normal(SEQUENCES)
        effect = bootstrap([sample(values)], 0.0, paired=False, number=0.0)
        covered += effect.low <= 0 <= effect.high
    assert 0.91 <= covered / repeats <= 0.99


def test_the_bootstrap_compares_on_the_same_sequences():
    """A sequence that is hard for both sides is no evidence, and neither is a seed that is bad at both lengths."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal((3, 1)) + rng.standard_normal(SEQUENCES)
    paired = bootstrap([sample(values), sample(values + 0.5)], 0.0, paired=True, number=0.0)
    assert (paired.value, paired.low, paired.high) == pytest.approx((-0.5, -0.5, -0.5))
    assert math.isnan(paired.p_above)
    same_seeds = values - values.mean(1, keepdims=True)
    shared = bootstrap([sample(same_seeds), sample(same_seeds + 0.5)], 0.0, paired=False, number=0.0)
    assert shared.high - shared.low < 1e-9
    different = bootstrap([sample(values), sample(values + 0.5)], 0.0, paired=False, number=0.0)
    assert different.high - different.low > 1


def test_p_of_the_bootstrap_is_the_share_of_resamples_beyond_the_threshold():
    values = np.random.default_rng(0).standard_normal((5, SEQUENCES))
    effect = bootstrap([sample(values)], 10.0, paired=False, number=0.0)
    assert (effect.p_above, effect.p_below) == (1.0, pytest.approx(1 / (RESAMPLES + 1)))
    at_bound = bootstrap([sample(values)], effect.low, paired=False, number=0.0)
    assert at_bound.p_above == pytest.approx(0.025, abs=0.002)
