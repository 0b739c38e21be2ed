"""Tests of attention with features: linear attention, Taylor features with a window, random features."""

import math
from functools import partial
from itertools import accumulate

import pytest
import torch
from torch import Tensor, nn

from cat.mixers.based.op import (
    attend_by_features,
    attend_by_scores,
    count_features,
    features,
    naive_taylor_attend,
    taylor_attend,
    taylor_attend_step,
)
from cat.mixers.build import build_mixer
from cat.mixers.linear.op import linear_attend, linear_attend_step
from cat.mixers.performer.op import naive_performer_attend, orthogonal_directions, performer_attend, performer_attend_step
from cat.mixers.registry import model_config
from cat.ops.attention import naive_attend
from cat.ops.position import rotate
from tests.helpers.reference import assert_matches_reference, close, in_parts, normal

BASED = {"mixer": "based", "heads": 3, "position": "none", "feature_width": None, "window": 5}
PERFORMER = {"mixer": "performer", "heads": 3, "position": "none", "features": 11}
both_forms = pytest.mark.parametrize("form", [attend_by_scores, attend_by_features])


def qkv(length: int, *, heads: int = 3, channels: int = 5) -> tuple[Tensor, ...]:
    return tuple(normal(2, heads, length, channels, seed=s) for s in range(3))


def directions(heads: int, features: int, channels: int) -> Tensor:
    """Draw the same directions at every call, in float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return orthogonal_directions(heads, features, channels).double()


def build(**parameters: object) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_config(**{"width": 18, "layers": 1, **parameters})
        return build_mixer(model.mixers[0], width=model.width, length=13).double()


def assert_finite(attend, *inputs: Tensor) -> None:
    inputs = tuple(x.detach().requires_grad_() for x in inputs)
    out = attend(*inputs)
    assert out.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(out.sum(), inputs))


def assert_causal(attend, length: int) -> None:
    """Assert that earlier outputs are equal to the bit for other, large later tokens."""
    x = qkv(length)
    for i in (1, length // 2, length - 1):
        later = [torch.cat([part[:, :, :i], 30 * part[:, :, i:].flip(1)], dim=2) for part in x]
        assert torch.equal(attend(*x)[:, :, :i], attend(*later)[:, :, :i])
        assert not torch.equal(attend(*x)[:, :, i:], attend(*later)[:, :, i:])


def assert_precise_under_autocast(attend, *inputs: Tensor) -> None:
    """Assert that only bfloat16 inputs and outputs are rounded to bfloat16."""
    rough = [x.bfloat16() for x in inputs]
    exact = attend(*(x.float() for x in rough))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attend(*(x.float() for x in rough)), exact)
        assert torch.equal(attend(*rough), exact.bfloat16())


@pytest.mark.parametrize("rotary", [False, True])
def test_linear_attention_sums_in_float32(rotary):
    def from_state(q, k, v):
        start = q.shape[2] // 2
        first, state = linear_attend_step(*(x[:, :, :start] for x in (q, k, v)), state=None, start=0, rotary=rotary)
        rest, _ = linear_attend_step(*(x[:, :, start:] for x in (q, k, v)), state=state, start=start, rotary=rotary)
        return torch.cat([first, rest], dim=2)

    for attend in (partial(linear_attend, rotary=rotary), from_state):
        assert_precise_under_autocast(attend, *qkv(997, channels=6))


# Taylor features and a window.


@pytest.mark.parametrize("window", [0, 5, 70])
def test_taylor_attention_at_positions_matches_its_reference_implementation(window):
    q, k, v = qkv(13, channels=2)
    positions = torch.tensor([[0, 5, 12], [1, 6, 7]])
    sizes = {"scale": 0.7, "window": window, "positions": positions}
    assert_matches_reference(partial(taylor_attend, **sizes), partial(naive_taylor_attend, **sizes), q[:, :, :3], k, v)


@pytest.mark.parametrize("parts", [[1] * 40, [9, 1, 30], [40]], ids=str)
@pytest.mark.parametrize("window", [0, 1, 3, 50])
def test_taylor_attention_continues_from_a_window_and_a_sum(parts, window):
    """Two channels have six features: every six tokens outside the window are added to the sum."""
    inputs, sizes = qkv(40, channels=2), {"scale": 0.7, "window": window}
    lengths = iter(accumulate(parts, initial=0))

    def step(*x, state):
        return taylor_attend_step(*x, state=state, length=next(lengths), **sizes)

    _, past = in_parts(step, inputs, parts, dim=2)
    assert past.keys.shape[2] < window + count_features(2)
    assert (past.far is None) == (window == 50)
    lengths = iter(accumulate(parts, initial=0))
    assert_matches_reference(lambda *x: in_parts(step, x, parts, dim=2)[0], partial(naive_taylor_attend, **sizes), *inputs)


@both_forms
@pytest.mark.parametrize("window", [0, 1, 5, 64, 70, 200])
@pytest.mark.parametrize("length", [1, 64, 65, 131])
def test_taylor_attention_matches_its_reference_implementation(form, length, window):
    assert_matches_reference(partial(form, window=window), partial(naive_taylor_attend, scale=1.0, window=window), *qkv(length))


@pytest.mark.parametrize(("length", "form"), [(1, "attend_by_scores"), (12, "attend_by_scores"), (13, "attend_by_features")])
def test_scores_are_used_up_to_twice_as_many_tokens_as_features(length, form, monkeypatch):
    calls = []
    for name, function in {"attend_by_scores": attend_by_scores, "attend_by_features": attend_by_features}.items():
        monkeypatch.setattr(
            f"cat.mixers.based.op.{name}", lambda *x, f=function, n=name, **options: calls.append(n) or f(*x, **options)
        )
    sizes = {"scale": 0.7, "window": 3}
    assert_matches_reference(partial(taylor_attend, **sizes), partial(naive_taylor_attend, **sizes), *qkv(length, channels=2))
    assert calls == [form]


@pytest.mark.parametrize("channels", [1, 2, 7])
def test_products_of_taylor_features_are_the_polynomial(channels):
    x, y = normal(1, 1, 1, 13, channels), normal(1, 1, 1, 17, channels, seed=1)
    scores = x @ y.mT
    assert features(x).shape[-1] == count_features(channels)
    close(features(x) @ features(y).mT, 1 + scores + scores**2 / 2)


@both_forms
@pytest.mark.parametrize(("score", "weight"), [(-1.0, 0.5), (0.0, 1.0), (2.0, 5.0)])
def test_the_token_before_the_window_has_the_weight_of_the_polynomial(form, score, weight):
    q, k, v = torch.zeros(3, 1, 1, 100, 2).double()
    q[..., 80, 0], k[..., 73:75, 0], v[..., 73, 0], v[..., 74, 1] = 1, score, 1, 1
    out = form(q, k, v, window=7)[0, 0, 80]
    shares = torch.tensor([weight, math.exp(score)], dtype=torch.float64)
    close(out, shares / (79 + shares.sum()))


@both_forms
@pytest.mark.parametrize("window", [97, 131])
def test_a_window_of_all_tokens_is_dense_attention(form, window):
    close(form(*qkv(97), window=window), naive_attend(*qkv(97), scale=1.0))


@both_forms
def test_the_taylor_error_is_of_third_order(form):
    q, k, v = qkv(97)
    errors = [(form(x, k, v, window=3) - naive_attend(x, k, v, scale=1.0)).norm() for x in (0.02 * q, 0.01 * q)]
    assert errors[0] / errors[1] == pytest.approx(8, rel=0.1)


@both_forms
@pytest.mark.parametrize("size", [-1e4, 1e-4, 1.0, 1e4])
def test_taylor_attention_is_stable(form, size):
    q, k, v = (x.float() for x in qkv(131))
    assert_finite(partial(form, window=3), size * q, k, v)
    assert_finite(partial(form, window=70), size * k, k, v)


def test_taylor_features_that_cancel_have_no_negative_weight():
    q, k, v = (1e4 * x.float() for x in qkv(997, channels=2))
    axis = torch.tensor([0.6, -0.8])
    q, k = q[..., :1] * axis, k[..., :1] * axis.flip(0).abs()  # every score is zero, but the square of a rounded one is not
    assert_finite(partial(attend_by_features, window=3), q, k, v)


@both_forms
def test_a_query_attends_to_its_only_match(form):
    q, v = torch.eye(67)[None, None], normal(1, 1, 67, 67).float()
    torch.testing.assert_close(form(1e3 * q, q, v, window=3), v)


@both_forms
def test_taylor_attention_is_causal(form):
    assert_causal(partial(form, window=5), 131)


@pytest.mark.parametrize("channels", [4, 31])  # by features, by scores
def test_taylor_attention_sums_in_float32(channels):
    assert_precise_under_autocast(partial(taylor_attend, scale=0.1, window=5), *qkv(997, channels=channels))


def test_based_rotates_queries_and_keys():
    q, k, v = qkv(19, channels=6)
    mixer = build(**{**BASED, "position": "rotary"})
    close(mixer.attend(q, k, v), naive_taylor_attend(rotate(q), rotate(k), v, scale=6**-0.5, window=5))
    close(build(**BASED).attend(q, k, v), naive_taylor_attend(q, k, v, scale=6**-0.5, window=5))


def test_based_with_a_window_of_all_tokens_is_the_transformer():
    based = build(**{**BASED, "position": "rotary", "window": 29, "conv_k": 3})
    transformer = build(mixer="attention", heads=3, position="rotary", conv_k=3)
    transformer.load_state_dict(based.state_dict())
    assert_matches_reference(based, transformer, normal(2, 29, 18))


# Random features.


@pytest.mark.parametrize("length", [1, 13, 64, 65, 131])
def test_performer_attention_matches_its_reference_implementation(length):
    sizes = {"scale": 0.7, "directions": directions(3, 13, 5)}
    assert_matches_reference(partial(performer_attend, **sizes), partial(naive_performer_attend, **sizes), *qkv(length))


@pytest.mark.parametrize("parts", [[1] * 5, [1, 130], [70, 1, 60, 5]], ids=str)
def test_performer_attention_continues_from_a_sum(parts):
    inputs, sizes = qkv(sum(parts)), {"scale": 0.7, "directions": directions(3, 11, 5)}
    assert_matches_reference(
        lambda *x: in_parts(lambda *y, state: performer_attend_step(*y, state=state, **sizes), x, parts, dim=2)[0],
        partial(naive_performer_attend, **sizes),
        *inputs,
    )


@pytest.mark.parametrize("small", [slice(70), slice(70, None), slice(None)], ids=["first", "last", "all"])
def test_the_sum_of_performer_attention_keeps_the_range_of_float32(small):
    """Some keys are so long that their features are far below the float32 range of the others."""
    q, k, v = (x.float() for x in qkv(75))
    sizes = {"scale": 0.7, "directions": directions(3, 11, 5).float()}
    k[:, :, small] *= 1e3
    out, _ = in_parts(lambda *x, state: performer_attend_step(*x, state=state, **sizes), (q, k, v), [70, 5], dim=2)
    torch.testing.assert_close(out, performer_attend(q, k, v, **sizes))
    assert out[:, :, -1].abs().amin() > 0


def test_random_features_approach_softmax_attention_with_their_number():
    q, k, v = qkv(29, heads=17)
    exact = naive_attend(q, k, v, scale=0.1)
    errors = [
        (performer_attend(q, k, v, scale=0.1, directions=directions(17, n, 5)) - exact).norm() / exact.norm()
        for n in (20, 320, 5120)
    ]
    assert errors[1] < errors[0] / 2.5
    assert errors[2] < errors[1] / 2.5
    assert errors[2] < 0.03


def test_directions_are_orthogonal_in_blocks_with_the_norms_of_normal_vectors():
    drawn = directions(500, 17, 7)
    for block in drawn.split(7, dim=1):
        products = block @ block.mT
        squares = products.diagonal(dim1=1, dim2=2)
        torch.testing.assert_close(products, torch.diag_embed(squares), rtol=0, atol=1e-4)
        assert squares.mean().item() == pytest.approx(7, rel=0.05)
        assert squares.var().item() == pytest.approx(14, rel=0.2)
    rows = drawn.flatten(0, 1)
    assert rows.mean(0).abs().max() < 0.05
    assert (rows.mT @ rows / len(rows) - torch.eye(7)).abs().max() < 0.05
    assert ((drawn[:, 0] * drawn[:, 7]).sum(-1).abs() > 1e-3).all()  # between two blocks


@pytest.mark.parametrize("size", [1e-3, 1.0, 10.0, 1e3])
def test_performer_attention_is_stable(size):
    q, k, v = (x.float() for x in qkv(131))
    attend = partial(performer_attend, scale=0.7, directions=directions(3, 13, 5).float())
    assert_finite(attend, size * q, size * k, v)
    assert_finite(attend, q, size * k, v)


def test_keys_equal_to_directions_do_not_overflow():
    w = directions(1, 67, 257).float()
    assert w.square().sum(-1).amax() / 2 > 100  # e^100 is infinite in float32
    q, k, v = w[None], w[None], normal(1, 1, 67, 257).float()
    assert_finite(partial(performer_attend, scale=1.0, directions=w), q, k, v)
    torch.testing.assert_close(performer_attend(q, k, v, scale=1.0, directions=w), v)


@pytest.mark.parametrize(("channels", "size"), [(5, 10.0), (64, 6.0), (300, 1.0), (300, 4.0)])
def test_performer_attention_is_exact_for_wide_heads_and_long_vectors(channels, size):
    """Features that differ by e^100, and queries whose keys are all far from the largest possible weight."""
    q, k, v = qkv(131, channels=channels)
    q, k, w = size * q, size * k, directions(3, 13, channels)
    attend = partial(performer_attend, scale=channels**-0.5)
    exact = naive_performer_attend(q, k, v, scale=channels**-0.5, directions=w)
    close(attend(q, k, v, directions=w), exact)
    single = attend(q.float(), k.float(), v.float(), directions=w.float())
    torch.testing.assert_close(single, exact.float(), rtol=1e-3, atol=1e-3)


def test_performer_attention_is_causal():
    assert_causal(partial(performer_attend, scale=0.7, directions=directions(3, 13, 5)), 131)


def test_performer_attention_sums_in_float32():
    sizes = {"scale": 0.1, "directions": directions(3, 13, 5).float()}
    assert_precise_under_autocast(partial(performer_attend, **sizes), *qkv(997))


def test_performer_attention_sums_in_float32_if_its_weights_are_float16():
    q, k, v = (6 * x.half() for x in qkv(997))
    rows = directions(3, 13, 5).half()
    exact = performer_attend(q.float(), k.float(), v.float(), scale=5**-0.5, directions=rows.float())
    assert torch.equal(performer_attend(q, k, v, scale=5**-0.5, directions=rows), exact.half())


def test_performer_rotates_queries_and_keys():
    q, k, v = qkv(19, channels=6)
    for position, turn in (("none", lambda x: x), ("rotary", rotate)):
        mixer = build(**{**PERFORMER, "position": position})
        close(mixer.attend(q, k, v), naive_performer_attend(turn(q), turn(k), v, scale=6**-0.5, directions=mixer.directions))


def test_directions_are_drawn_once_and_saved_with_the_weights():
    mixer, other = build(**PERFORMER), build(**PERFORMER)
    assert mixer.directions.shape == (3, 11, 6)
    assert build(**{**PERFORMER, "features": 997}).directions.square().sum(-1).mean().item() == pytest.approx(6, rel=0.1)
    assert torch.equal(mixer.directions, other.directions)
    assert "directions" in mixer.state_dict()
    assert "directions" not in dict(mixer.named_parameters())


@pytest.mark.parametrize("op", ["based", "performer"])
def test_steps_after_padding_equal_those_without(op):
    """Based has more tokens than its window and features; Performer has keys with features far below those of padding."""
    padding = torch.tensor([0, 23])
    q, k, v = qkv(60, channels=2)
    is_padding = torch.arange(60) < padding[:, None]
    if op == "based":
        step = partial(taylor_attend_step, scale=0.5, window=3)
    else:
        k, step = 15 * k, partial(performer_attend_step, scale=1.0, directions=directions(3, 7, 2))
    k, v = (x.masked_fill(is_padding[:, None, :, None], fill) for x, fill in ((k, 0.0), (v, 5.0)))

    def run(q, k, v, padding, parts):
        state, outputs, length = None, [], 0
        for part in zip(*(x.split(parts, dim=2) for x in (q, k, v)), strict=True):
            if op == "based":
                options = {"length": length, "padding": padding}
            else:
                options = {"padding": None if length else torch.arange(parts[0]) < padding[:, None]}
            out, state = step(*part, state=state, **options)
            outputs.append(out)
            length += part[0].shape[2]
        return torch.cat(outputs, dim=2)

    out = run(q, k, v, padding, [40, 1, 19])
    for row, first in enumerate(padding.tolist()):
        alone = (x[row : row + 1, :, first:] for x in (q, k, v))
        close(out[row : row + 1, :, first:], run(*alone, torch.zeros(1, dtype=torch.long), [40 - first, 1, 19]))


def test_performer_has_c_ln_c_features_unless_it_says_otherwise():
    assert build(mixer="performer", width=64, heads=1).directions.shape == (1, 266, 64)
    assert build(mixer="performer", width=64, heads=2, features=7).directions.shape == (2, 7, 32)
    assert build(mixer="performer", heads=18).directions.shape == (18, 1, 1)
