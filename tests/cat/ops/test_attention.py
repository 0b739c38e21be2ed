"""Dense attention against the definition."""

from functools import partial

import pytest
import torch

from cat.ops.attention import attend, logits, naive_attend
from tests.helpers.reference import assert_twins, close, normal


@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize("length", [1, 2, 13])
def test_attend_is_the_definition(length, alibi, asked, monkeypatch):
    monkeypatch.setattr("cat.ops.attention.ROWS", 5)
    at = torch.tensor([[0, length // 2, length - 1], [length // 3, length // 2, length - 1]]) if asked else None
    q, k, v = (normal(2, 3, tokens, 7, seed=s) for s, tokens in enumerate((3 if asked else length, length, length)))
    sizes = {"scale": 0.7, "alibi": alibi, "at": at}
    assert_twins(partial(attend, **sizes), partial(naive_attend, **sizes), q, k, v)


@pytest.mark.parametrize("alibi", [False, True])
def test_attention_is_the_softmax_of_its_logits(alibi):
    q, k, v = (normal(2, 3, 13, 7, seed=s) for s in range(3))
    close(logits(q, k, scale=0.7, alibi=alibi).softmax(-1) @ v, naive_attend(q, k, v, scale=0.7, alibi=alibi))


def test_alibi_in_float32_is_as_exact_far_from_the_first_token_as_near_it():
    q, k, v = (normal(1, 8, 1031, 4, seed=s) for s in range(3))
    exact = attend(q, k, v, scale=0.7, alibi=True)
    errors = (attend(q.float(), k.float(), v.float(), scale=0.7, alibi=True) - exact).abs()
    assert errors.max() < 4e-6


def test_a_sharp_query_returns_the_value_of_its_key():
    q, v = torch.eye(7)[None, None], normal(1, 1, 7, 7).float()
    torch.testing.assert_close(attend(q, q, v, scale=1e3), v)


def test_without_scores_attention_is_the_running_mean():
    v = normal(2, 3, 7, 5)
    means = v.cumsum(2) / torch.arange(1, 8)[:, None]
    close(attend(torch.zeros_like(v), v, v, scale=1.0), means)
