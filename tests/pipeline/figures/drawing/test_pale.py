"""Variants that are no better than a partial strategy, and alike, are one pale line."""

import pandas as pd

from pipeline.figures.drawing.pale import pale_groups

LIMIT = pd.Series({1: 0.2, 2: 0.1, 4: 0.1})


def scores(**curves):
    rows = [(variant, x, value) for variant, values in curves.items() for x, value in zip(LIMIT.index, values, strict=True)]
    return pd.DataFrame(rows, columns=["variant", "multiple", "value"])


def test_variants_below_the_limit_are_grouped_by_their_curves():
    table = scores(
        a=(0.2, 0.1, 0.1), b=(0.19, 0.11, 0.09), solves=(1, 1, 1), better=(0.2, 0.3, 0.1), low=(0, 0, 0), lower=(0, 0, 0.01)
    )
    assert pale_groups(table, LIMIT, x="multiple") == [["low", "lower"], ["b", "a"]]
    assert pale_groups(table, 0.2, x="multiple") == [["low", "lower"], ["b", "a"]]


def test_a_single_variant_keeps_its_look():
    assert pale_groups(scores(a=(0.2, 0.1, 0.1), solves=(1, 1, 1)), LIMIT, x="multiple") == []


def test_a_length_without_a_reference_or_a_score_groups_nothing():
    table = scores(a=(0.2, 0.1, 0.1), b=(0.2, 0.1, 0.1))
    assert pale_groups(table, LIMIT.drop(4), x="multiple") == []
    assert pale_groups(table.assign(value=float("nan")), LIMIT, x="multiple") == []
