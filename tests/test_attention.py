"""Dense attention against the definition."""

from functools import partial

import pytest
import torch

from cat.attention import attend, naive_attend
from cat.position import alibi_bias
from tests.twins import assert_twins, close, normal


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("length", [1, 2, 13])
def test_attend_is_the_definition(length, biased):
    q, k, v = (normal(2, 3, length, 5, seed=s) for s in range(3))
    bias = alibi_bias(3, length, q) if biased else None
    assert_twins(partial(attend, scale=0.7, bias=bias), partial(naive_attend, scale=0.7, bias=bias), q, k, v)


def test_a_sharp_query_returns_the_value_of_its_key():
    q, v = torch.eye(7)[None, None], normal(1, 1, 7, 7).float()
    torch.testing.assert_close(attend(q, q, v, scale=1e3), v)


def test_without_scores_attention_is_the_running_mean():
    v = normal(2, 3, 7, 5)
    means = v.cumsum(2) / torch.arange(1, 8)[:, None]
    close(attend(torch.zeros_like(v), v, v, scale=1.0), means)
