"""Dense attention against its reference implementation."""

from functools import partial

import pytest
import torch

from cat.ops.attention import attend, attend_last, logits, naive_attend, relative_bias, repeat_heads
from cat.ops.position import alibi_slopes
from tests.helpers.reference import assert_matches_reference, close, normal

OPTIONS = {
    "plain": {},
    "alibi": {"slopes": alibi_slopes(6, torch.empty(0))},
    "window": {"window": 4},
    "window_1": {"window": 1},
    "alibi_window": {"slopes": alibi_slopes(6, torch.empty(0)), "window": 5},
}
VALID = torch.arange(13) >= torch.tensor([[0], [4]])


def inputs(length, queries=None, *, keys=6):
    """Return q with 6 heads, and k and v with `keys` heads."""
    shapes = (6, queries or length), (keys, length), (keys, length)
    return [normal(2, *shape, 7, seed=seed) for seed, shape in enumerate(shapes)]


@pytest.fixture(autouse=True)
def several_parts(monkeypatch):
    monkeypatch.setattr("cat.ops.attention.MIN_PART", 3)


@pytest.mark.parametrize("keys", [6, 2, 1])
@pytest.mark.parametrize("at_positions", [False, True])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("length", [1, 2, 13])
def test_attend_matches_reference(length, options, at_positions, keys):
    positions = torch.tensor([[0, length // 2, length - 1], [length // 3, length // 2, length - 1]]) if at_positions else None
    options = {"scale": 0.7, "positions": positions, **options}
    q, k, v = inputs(length, 3 if at_positions else length, keys=keys)
    assert_matches_reference(partial(attend, **options), partial(naive_attend, **options), q, k, v)


@pytest.mark.parametrize("keys", [6, 2])
@pytest.mark.parametrize("options", [OPTIONS["plain"], OPTIONS["alibi"]], ids=["plain", "alibi"])
@torch.no_grad()
def test_tiles_of_queries_match_the_reference(options, keys, monkeypatch):
    monkeypatch.setattr("cat.ops.attention.TILE", 2)
    monkeypatch.setattr("cat.ops.attention._attend", None)  # the kernel for all queries at once
    positions = torch.tensor([[0, 3, 4, 11, 12], [12, 2, 7, 3, 5]])
    q, k, v = inputs(13, 5, keys=keys)
    options = {"scale": 0.7, "positions": positions, **options}
    close(attend(q, k, v, **options), naive_attend(q, k, v, **options))


@pytest.mark.parametrize("keys", [6, 2])
@pytest.mark.parametrize("valid", [None, VALID], ids=["all", "padded"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("queries", [1, 3, 13])
def test_the_last_outputs_are_those_of_all(queries, options, valid, keys):
    q, k, v = inputs(13, keys=keys)
    options = {"scale": 0.7, "valid": valid, **options}
    close(attend_last(q[:, :, -queries:], k, v, **options), naive_attend(q, k, v, **options)[:, :, -queries:])


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_keys_that_are_not_valid_change_no_other_output(options):
    q, k, v = inputs(13)
    options = {"scale": 0.7, **options}
    out = attend(q, k, v, valid=VALID, **options)
    close(out, naive_attend(q, k, v, valid=VALID, **options))
    alone = attend(*(x[1:, :, 4:] for x in (q, k, v)), **options)
    close(out[1:, :, 4:], alone)
    positions = torch.arange(5, 13).expand(2, -1)
    close(attend(q[:, :, 5:], k, v, valid=VALID, positions=positions, **options), out[:, :, 5:])


@pytest.mark.parametrize("keys", [6, 2])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_attention_is_the_softmax_of_its_logits(options, keys):
    q, k, v = inputs(13, keys=keys)
    weights = logits(q, k, scale=0.7, **options).softmax(-1)
    close(weights @ repeat_heads(v, 6), naive_attend(q, k, v, scale=0.7, **options))


@pytest.mark.parametrize("window", [None, 2])
def test_alibi_subtracts_a_multiple_of_the_distance(window):
    distance = torch.arange(4, -2, -1)
    bias = relative_bias(distance, normal(1), slopes=torch.tensor([0.5, 0.25]), window=window)
    hidden = [-float("inf")] * (0 if window is None else 3)
    assert bias.tolist() == [
        [*hidden, *[-slope * d for d in range(4 - len(hidden), -1, -1)], -float("inf")] for slope in (0.5, 0.25)
    ]


@pytest.mark.parametrize("length", [1031, 2060])
def test_alibi_in_float32_is_equally_exact_at_every_position(length, monkeypatch):
    monkeypatch.undo()
    q, k, v = (normal(1, 8, length, 4, seed=s) for s in range(3))
    options = {"scale": 0.7, "slopes": alibi_slopes(8, q)}
    errors = (attend(q.float(), k.float(), v.float(), **options) - attend(q, k, v, **options)).abs()
    assert errors.max() < 4e-6


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_memory_for_the_gradient_is_linear_in_the_length(options):
    """Tensors that are kept for the gradient, in multiples of the input."""
    x = [t.requires_grad_() for t in inputs(512)]
    kept: dict[int, int] = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = attend(*x, scale=0.7, **options)
    assert out.requires_grad
    assert sum(kept.values()) < 8 * x[0].nbytes * (1 + 2 / 7)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_dropped_weights_leave_the_mean_output(options):
    q, k, v = (x[:, :2] for x in inputs(7))
    if "slopes" in options:
        options = {**options, "slopes": options["slopes"][:2]}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        out = attend(*(x.repeat(2000, 1, 1, 1) for x in (q, k, v)), scale=0.7, dropout=0.25, **options).unflatten(0, (2000, 2))
    expected = attend(q, k, v, scale=0.7, **options)
    assert out.std(0).max() > 0.1
    assert ((out.mean(0) - expected).abs() / out.std(0)).max() * 2000**0.5 < 4.5


def test_large_scale_returns_the_value_of_the_best_key():
    q, v = torch.eye(7)[None, None], normal(1, 1, 7, 7).float()
    torch.testing.assert_close(attend(q, q, v, scale=1e3), v)


def test_zero_scores_give_the_running_mean():
    v = normal(2, 3, 7, 5)
    means = v.cumsum(2) / torch.arange(1, 8)[:, None]
    close(attend(torch.zeros_like(v), v, v, scale=1.0), means)
