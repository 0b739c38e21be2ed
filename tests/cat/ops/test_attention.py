"""Dense attention against its reference implementation."""

from functools import partial

import pytest
import torch

from cat.ops.attention import attend, logits, naive_attend
from tests.helpers.reference import assert_matches_reference, close, normal


@pytest.mark.parametrize("at_positions", [False, True])
@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize("length", [1, 2, 13])
def test_attend_matches_reference(length, alibi, at_positions, monkeypatch):
    monkeypatch.setattr("cat.ops.attention.QUERY_CHUNK", 5)
    positions = torch.tensor([[0, length // 2, length - 1], [length // 3, length // 2, length - 1]]) if at_positions else None
    q, k, v = (normal(2, 3, tokens, 7, seed=s) for s, tokens in enumerate((3 if at_positions else length, length, length)))
    options = {"scale": 0.7, "alibi": alibi, "positions": positions}
    assert_matches_reference(partial(attend, **options), partial(naive_attend, **options), q, k, v)


@pytest.mark.parametrize("alibi", [False, True])
def test_attention_is_the_softmax_of_its_logits(alibi):
    q, k, v = (normal(2, 3, 13, 7, seed=s) for s in range(3))
    close(logits(q, k, scale=0.7, alibi=alibi).softmax(-1) @ v, naive_attend(q, k, v, scale=0.7, alibi=alibi))


def test_alibi_in_float32_is_equally_exact_at_every_position():
    q, k, v = (normal(1, 8, 1031, 4, seed=s) for s in range(3))
    exact = attend(q, k, v, scale=0.7, alibi=True)
    errors = (attend(q.float(), k.float(), v.float(), scale=0.7, alibi=True) - exact).abs()
    assert errors.max() < 4e-6


def test_large_scale_returns_the_value_of_the_best_key():
    q, v = torch.eye(7)[None, None], normal(1, 1, 7, 7).float()
    torch.testing.assert_close(attend(q, q, v, scale=1e3), v)


def test_zero_scores_give_the_running_mean():
    v = normal(2, 3, 7, 5)
    means = v.cumsum(2) / torch.arange(1, 8)[:, None]
    close(attend(torch.zeros_like(v), v, v, scale=1.0), means)
