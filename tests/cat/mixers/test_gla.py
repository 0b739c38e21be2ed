"""Tests of gated linear attention: its two implementations, its properties, and its mixer."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cat.mixers.build import build_mixer
from cat.mixers.gla.op import CHUNK, gated_linear_attend, gated_linear_attend_step, naive_gated_linear_attend
from cat.mixers.linear.op import causal_sum
from cat.mixers.registry import model_config
from tests.helpers.mixers import assert_uniform
from tests.helpers.reference import assert_matches_reference, close, in_parts, normal

BATCH, HEADS, CHANNELS, VALUES, WIDTH, RANK = 2, 3, 5, 7, 18, 4
attend, naive_attend = (partial(form, scale=0.3) for form in (gated_linear_attend, naive_gated_linear_attend))
both_forms = pytest.mark.parametrize("form", [attend, naive_attend])
both_backends = pytest.mark.usefixtures("backend")
gated = pytest.mark.parametrize("output_gate", [False, True])


def inputs(length: int, size: float = 1.0) -> tuple[Tensor, ...]:
    """q, k, v and log alpha; the mean of -log alpha is about 0.8 times `size`."""
    q, k, log_decay = (normal(BATCH, HEADS, length, CHANNELS, seed=s) for s in range(3))
    return q, k, normal(BATCH, HEADS, length, VALUES, seed=3), -F.softplus(log_decay) * size


def build(**parameters: object) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = {"mixer": "gla", "width": WIDTH, "layers": 1, "heads": HEADS, "position": "none", **parameters}
        model = model_config(**config)
        return build_mixer(model.mixers[0], width=model.width, length=13).double()


@both_backends
@pytest.mark.parametrize("length", [1, 2, 3, 5, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 1, 131])
def test_gated_linear_attention_matches_its_reference_implementation(length):
    assert_matches_reference(attend, naive_attend, *inputs(length))


@both_backends
@pytest.mark.parametrize("parts", [[1] * 5, [CHUNK + 1, 1, 2 * CHUNK], [2, 70]], ids=str)
def test_gated_linear_attention_continues_from_a_state(parts):
    step = partial(gated_linear_attend_step, scale=0.3)
    naive = partial(naive_gated_linear_attend, scale=0.3)
    assert_matches_reference(lambda *x: in_parts(step, x, parts, dim=2)[0], naive, *inputs(sum(parts)))


@both_backends
@pytest.mark.parametrize("tokens", [slice(None), slice(17, 18), slice(None, None, 7)])
@pytest.mark.parametrize("channels", [slice(None), slice(2, 4)])
@pytest.mark.parametrize("decay", [50.0, 1e4, math.inf])
def test_strong_decay_clears_the_state_and_nothing_else(tokens, channels, decay):
    x = inputs(67, size=1 / 16)
    x[-1][:, :, tokens, channels] = -decay
    assert_matches_reference(attend, naive_attend, *x)

    single = [x.float().requires_grad_() for x in x]
    out = attend(*single)
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(out.sum(), single))
    torch.testing.assert_close(out, attend(*x).float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [0.0, 1e-3, 1.0, 100.0])
def test_float32_is_precise_over_a_long_sequence(size):
    x = inputs(2003, size)
    exact = attend(*x).float()
    error = attend(*(x.float() for x in x)) - exact
    assert error.norm() < 5e-6 * exact.norm()


def test_weights_use_float32_under_autocast():
    rough = [x.bfloat16() for x in inputs(997, size=0.01)]
    exact = attend(*(x.float() for x in rough))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attend(*(x.float() for x in rough)), exact)
        assert torch.equal(attend(*rough), exact.bfloat16())


def test_gated_linear_attention_is_causal():
    x = inputs(131)
    for i in (1, 65, 130):
        later = [torch.cat([x[:, :, :i], x[:, :, i:].flip(1)], dim=2) for x in x]
        assert torch.equal(attend(*x)[:, :, :i], attend(*later)[:, :, :i])
        assert not torch.equal(attend(*x)[:, :, i:], attend(*later)[:, :, i:])


@pytest.mark.parametrize("mapped", [(0, 0, 0, 0), (1, None, 3, None), (None, None, None, 2)])
def test_vmap_over_any_of_its_inputs(mapped):
    x = inputs(37)
    stacked = [x if axis is None else torch.stack([x, x / 2, 3 * x], axis) for x, axis in zip(x, mapped, strict=True)]
    rows = [[x] * 3 if axis is None else x.unbind(axis) for x, axis in zip(stacked, mapped, strict=True)]
    close(torch.vmap(attend, mapped)(*stacked), torch.stack([attend(*row) for row in zip(*rows, strict=True)]))


# Properties.


@both_forms
def test_without_decay_it_is_linear_attention_without_features_and_normalizer(form):
    q, k, v, log_decay = inputs(131)
    close(form(q, k, v, torch.zeros_like(log_decay)), 0.3 * causal_sum(q, k, v))


@both_forms
def test_a_decay_shared_by_all_channels_depends_on_the_distance(form):
    q, k, v, _ = inputs(67)
    distance = torch.arange(67)[:, None] - torch.arange(67)
    log_decay = torch.full_like(q, math.log(0.9))
    close(form(q, k, v, log_decay), 0.3 * (q @ k.mT * 0.9 ** distance.double()).tril() @ v)


@both_forms
def test_each_key_channel_decays_at_its_own_rate(form):
    length = 2 * CHUNK + 3
    values, log_decay = normal(1, 1, length, VALUES), -normal(1, 1, length, CHANNELS, seed=1).exp() / 20
    keys = torch.zeros(1, 1, length, CHANNELS).double()
    keys[:, :, 0] = 1  # only the first token is stored, for every channel
    for channel in range(CHANNELS):
        query = torch.eye(CHANNELS).double()[channel].expand(1, 1, length, -1)
        decay = (log_decay[0, 0, :, channel].cumsum(0) - log_decay[0, 0, 0, channel]).exp()
        close(form(query, keys, values, log_decay)[0, 0], 0.3 * decay[:, None] * values[0, 0, 0])


# The mixer.


@gated
def test_the_mixer_computes_its_gates_from_its_input_and_normalizes_its_output(output_gate):
    mixer = build(gate_rank=RANK, conv_q=2, conv_k=3, output_gate=output_gate)
    x = normal(BATCH, 41, WIDTH)
    q, k, v = mixer.convolve(mixer.split_projection(mixer.project(x))[0])
    assert q.shape == k.shape == (BATCH, HEADS, 41, WIDTH // HEADS // 2)
    low = x @ mixer.decay[0].weight.T
    decay = torch.sigmoid(low @ mixer.decay[1].weight.T + mixer.decay[1].bias) ** (1 / 16)
    log_decay = decay.log().unflatten(-1, (HEADS, -1)).transpose(1, 2)
    heads = naive_gated_linear_attend(q, k, v, log_decay, scale=(WIDTH // HEADS / 2) ** -0.5)
    heads = heads / (heads.square().mean(-1, keepdim=True) + 1e-5).sqrt() * nn.init.normal_(mixer.norm.weight)
    out = heads.permute(0, 2, 1, 3).reshape(BATCH, 41, WIDTH)
    if output_gate:
        gate = x @ mixer.gate.weight.T + mixer.gate.bias
        out = out * gate * torch.sigmoid(gate)
    close(mixer(x), out @ mixer.o_proj.weight.T)


def test_every_weight_starts_as_published():
    """nn.Linear, with biases in the map to the decays and in the output gate, and gain 1."""
    mixer = build(width=1000, heads=1)
    assert mixer.q_proj.weight.shape == mixer.k_proj.weight.shape == (500, 1000)
    for linear in (mixer.q_proj, mixer.k_proj, mixer.v_proj, mixer.o_proj, mixer.gate, *mixer.decay):
        assert_uniform(linear.weight, -(linear.in_features**-0.5), linear.in_features**-0.5)
    assert_uniform(mixer.decay[1].bias, -0.25, 0.25)
    assert (mixer.norm.weight == 1).all()


def test_the_map_to_the_gates_has_its_configured_rank():
    mixer = build(gate_rank=RANK)
    slopes = torch.autograd.functional.jacobian(mixer.decay, normal(WIDTH))
    assert torch.linalg.matrix_rank(slopes) == RANK
