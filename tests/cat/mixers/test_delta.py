"""Tests of the delta rule: its two implementations, its properties, and its mixer."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cat.mixers.build import build_mixer
from cat.mixers.delta.op import CHUNK, delta_rule, delta_rule_step, naive_delta_rule
from cat.mixers.registry import model_config
from tests.helpers.mixers import assert_uniform
from tests.helpers.reference import assert_matches_reference, close, in_parts, normal

BATCH, HEADS, CHANNELS, WIDTH = 2, 3, 5, 18
both_backends = pytest.mark.usefixtures("backend")
gated = pytest.mark.parametrize("gate", [False, True])
both_forms = pytest.mark.parametrize("rule", [delta_rule, naive_delta_rule])


def inputs(length: int, *, gate: bool) -> tuple[Tensor, ...]:
    """q, unit k, v, beta, and log alpha if there is a gate."""
    q, k, v = (normal(BATCH, HEADS, length, CHANNELS, seed=s) for s in range(3))
    beta, log_decay = (normal(BATCH, HEADS, length, seed=s) for s in (3, 4))
    ungated = q, F.normalize(k, dim=-1), v, beta.sigmoid()
    return (*ungated, -F.softplus(log_decay)) if gate else ungated


def build(**parameters: object) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = {"mixer": "delta", "width": WIDTH, "layers": 1, "heads": HEADS, "position": "none", **parameters}
        model = model_config(**config)
        return build_mixer(model.mixers[0], width=model.width, length=13).double()


@both_backends
@gated
@pytest.mark.parametrize("length", [1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 1, 131])
def test_the_delta_rule_matches_its_reference_implementation(length, gate):
    assert_matches_reference(delta_rule, naive_delta_rule, *inputs(length, gate=gate))


@both_backends
@gated
@pytest.mark.parametrize("parts", [[1] * 5, [CHUNK + 1, 1, 2 * CHUNK], [2, 70]], ids=str)
def test_the_delta_rule_continues_from_a_state(parts, gate):
    x = inputs(sum(parts), gate=gate)
    assert_matches_reference(lambda *x: in_parts(delta_rule_step, x, parts, dim=2)[0], naive_delta_rule, *x)


@both_backends
@pytest.mark.parametrize("tokens", [slice(None), slice(17, 18), slice(None, None, 7)])
@pytest.mark.parametrize("decay", [50.0, 1e4])
def test_strong_decay_clears_the_state_and_nothing_else(tokens, decay):
    x = inputs(67, gate=True)
    x[-1][:, :, tokens] = -decay
    assert_matches_reference(delta_rule, naive_delta_rule, *x)

    single = [x.float().requires_grad_() for x in x]
    out = delta_rule(*single)
    assert out.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(out.sum(), single))
    torch.testing.assert_close(out, delta_rule(*x).float(), rtol=0, atol=1e-4 if decay < 100 else 1e-2)


@both_backends
@gated
def test_float32_errors_do_not_accumulate_over_a_long_sequence(gate):
    x = inputs(997, gate=gate)
    if gate:
        x = (*x[:-1], x[-1] / 100)
    expected = delta_rule(*x)
    torch.testing.assert_close(delta_rule(*(x.float() for x in x)), expected.float(), rtol=0, atol=1e-5)


@both_backends
@gated
def test_the_delta_rule_uses_float32_under_autocast(gate):
    rough = [x.bfloat16() for x in inputs(997, gate=gate)]
    exact = delta_rule(*(x.float() for x in rough))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(delta_rule(*(x.float() for x in rough)), exact)
        assert torch.equal(delta_rule(*rough), exact.bfloat16())


@gated
def test_the_delta_rule_is_causal(gate):
    x = inputs(131, gate=gate)
    for i in (1, 65, 130):
        later = [torch.cat([x[:, :, :i], x[:, :, i:].flip(1)], dim=2) for x in x]
        assert torch.equal(delta_rule(*x)[:, :, :i], delta_rule(*later)[:, :, :i])
        assert not torch.equal(delta_rule(*x)[:, :, i:], delta_rule(*later)[:, :, i:])


# Properties of the rule.


@both_forms
def test_orthonormal_keys_retrieve_their_values(rule):
    length = 2 * CHUNK + 3
    keys, values = torch.eye(length).double()[None, None], normal(1, 1, length, length)
    earlier = torch.arange(length) // 2
    close(rule(keys[:, :, earlier], keys, values, torch.ones(1, 1, length).double()), values[:, :, earlier])


@both_forms
@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_writing_a_key_again_moves_its_value_by_the_fraction_beta(rule, beta):
    length = 2 * CHUNK + 3
    key, values = F.normalize(normal(1, 1, 1, CHANNELS), dim=-1), normal(1, 1, length, CHANNELS, seed=1)
    out = rule(*[key.expand_as(values)] * 2, values, torch.full((1, 1, length), beta, dtype=torch.float64))
    value = torch.zeros(CHANNELS).double()
    for t in range(length):
        value = (1 - beta) * value + beta * values[0, 0, t]  # with beta = 1, the new value
        close(out[0, 0, t], value)


@both_forms
def test_the_state_decays_and_the_new_value_does_not(rule):
    length = 2 * CHUNK + 3
    key, value = (F.normalize(normal(1, 1, 1, CHANNELS, seed=s), dim=-1).expand(1, 1, length, -1) for s in (0, 1))
    beta, log_decay = torch.zeros(1, 1, length).double(), -normal(1, 1, length).exp() / 20
    beta[..., 0] = 0.7
    decay = (log_decay[0, 0].cumsum(0) - log_decay[0, 0, 0]).exp()
    close(rule(key, key, value, beta, log_decay)[0, 0], 0.7 * decay[:, None] * value[0, 0])


@both_forms
def test_without_decay_the_gate_changes_nothing(rule):
    *x, log_decay = inputs(67, gate=True)
    close(rule(*x, torch.zeros_like(log_decay)), rule(*x))


# The mixer.


@gated
def test_the_mixer_scales_convolved_keys_and_computes_its_rates_from_its_input(gate):
    mixer = build(conv_q=2, conv_k=3, gate=gate)
    convolutions = {"conv_q": 2, "conv_k": 3, "conv_v": 4, "sharing": "channel", "conv_activation": "silu"}
    plain = build(mixer="attention", **convolutions)
    plain.load_state_dict(mixer.state_dict(), strict=False)
    x = normal(BATCH, 41, WIDTH)
    q, k, v = plain.prepare(plain.project(x))
    rates = [torch.sigmoid(x @ mixer.strength.weight.T).mT]
    if gate:
        step = torch.log1p(torch.exp(x @ mixer.dt_proj.weight.T + mixer.dt_proj.bias))
        rates.append((-mixer.log_rate.exp() * step).mT)
    heads = naive_delta_rule(q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True), v, *rates)
    nn.init.normal_(mixer.norm.weight)
    heads = heads / (heads.square().mean(-1, keepdim=True) + 1e-5).sqrt() * mixer.norm.weight
    gates = F.silu(x @ mixer.gate.weight.T)
    close(mixer(x), heads.permute(0, 2, 1, 3).reshape(BATCH, 41, WIDTH) * gates @ mixer.o_proj.weight.T)


def test_a_gate_without_decay_equals_no_gate():
    gate, plain = build(conv_k=3), build(conv_k=3, gate=False)
    plain.load_state_dict({name: w for name, w in gate.state_dict().items() if name in plain.state_dict()})
    nn.init.constant_(gate.dt_proj.bias, -1000)
    close(gate(normal(BATCH, 41, WIDTH)), plain(normal(BATCH, 41, WIDTH)))


def test_every_weight_starts_as_published():
    """The authors' layer: rates uniform in (0, 16), steps log-uniform, nn.Conv1d, nn.Linear, gain 1."""
    mixer = build(width=2000, heads=1000)
    assert_uniform(mixer.log_rate.exp(), 0, 16)
    assert_uniform(F.softplus(mixer.dt_proj.bias).log(), math.log(0.001), math.log(0.1))
    for projection in "qkv":
        assert_uniform(mixer.filters[projection].kernel, -(4**-0.5), 4**-0.5)
    for name in ("q_proj", "k_proj", "v_proj", "o_proj", "strength", "dt_proj", "gate"):
        assert_uniform(getattr(mixer, name).weight, -(2000**-0.5), 2000**-0.5)
    assert (mixer.norm.weight == 1).all()
    assert {name for name, _ in mixer.named_parameters() if "bias" in name} == {"dt_proj.bias"}


def test_a_key_retrieves_the_value_that_was_stored_for_it():
    mixer = build(gate=False, output_gate=False, conv_q=None, conv_k=None, conv_v=None)
    nn.init.constant_(mixer.strength.weight, 1000 / WIDTH)
    with torch.no_grad():
        mixer.q_proj.weight.copy_(mixer.k_proj.weight)
    x = 1 + normal(BATCH, 1, WIDTH).abs()
    _, _, v, *_ = mixer.prepare(mixer.project(x))
    close(mixer(x), mixer.norm(v)[:, :, 0].flatten(1)[:, None] @ mixer.o_proj.weight.T)
