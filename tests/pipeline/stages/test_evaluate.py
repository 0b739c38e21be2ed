"""Evaluation scores equal weights once."""

import pandas as pd
import pytest

from pipeline.stages import evaluate
from tests.helpers.study import stage


@pytest.fixture
def scored(monkeypatch):
    """The runs that are scored: (variant, seed)."""
    jobs, function = [], evaluate._evaluate_model

    def counted(task, data, precision, job, *others):
        jobs.append((job.variant, job.seed))
        return function(task, data, precision, job, *others)

    monkeypatch.setattr(evaluate, "_evaluate_model", counted)
    return jobs


def test_seeds_with_equal_weights_are_scored_once(study, scored):
    stage("evaluate", "copying")
    assert scored.count(("construction", 0)) == 1
    assert ("construction", 1) not in scored
    assert {("qk", 0), ("qk", 1)} < set(scored)
    table = pd.read_csv("results/copying.csv").set_index(["variant", "seed"])
    first, second = (table.loc["construction", seed].reset_index(drop=True) for seed in (0, 1))
    pd.testing.assert_frame_equal(first, second)
    assert len(first) >= 4
