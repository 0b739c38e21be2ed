"""The delta rule: its two forms, what it means, and the mixer that is made of it."""

import math

import pytest
import torch
import torch.nn.functional as F
from pydantic import TypeAdapter
from torch import Tensor, nn

from cat.mixers.build import build_mixer
from cat.mixers.delta.op import CHUNK, delta_rule, delta_rule_next, naive_delta_rule
from cat.mixers.registry import AnyModel
from tests.helpers.reference import assert_twins, close, in_parts, normal

BATCH, HEADS, CHANNELS, WIDTH = 2, 3, 5, 18
gated = pytest.mark.parametrize("gate", [False, True])
both_forms = pytest.mark.parametrize("rule", [delta_rule, naive_delta_rule])


def inputs(length: int, *, gate: bool) -> tuple[Tensor, ...]:
    """q, unit k, v, beta, and log alpha if there is a gate."""
    q, k, v = (normal(BATCH, HEADS, length, CHANNELS, seed=s) for s in range(3))
    beta, log_decay = (normal(BATCH, HEADS, length, seed=s) for s in (3, 4))
    streams = q, F.normalize(k, dim=-1), v, beta.sigmoid()
    return (*streams, -F.softplus(log_decay)) if gate else streams


def build(**parameters: object) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = {"mixer": "delta", "width": WIDTH, "layers": 1, "heads": HEADS, "position": "none", **parameters}
        return build_mixer(TypeAdapter(AnyModel).validate_python(config), 13).double()


@gated
@pytest.mark.parametrize("length", [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 1, 131])
def test_the_delta_rule_is_the_definition(length, gate):
    assert_twins(delta_rule, naive_delta_rule, *inputs(length, gate=gate))


@gated
@pytest.mark.parametrize("parts", [[1] * 5, [CHUNK + 1, 1, 2 * CHUNK], [2, 70]], ids=str)
def test_it_goes_on_from_a_state(parts, gate):
    x = inputs(sum(parts), gate=gate)
    assert_twins(lambda *x: in_parts(delta_rule_next, x, parts, dim=2)[0], naive_delta_rule, *x)


@pytest.mark.parametrize("places", [slice(None), slice(17, 18), slice(None, None, 7)])
@pytest.mark.parametrize("decay", [50.0, 1e4])
def test_strong_decay_forgets_and_nothing_else(places, decay):
    streams = inputs(67, gate=True)
    streams[-1][:, :, places] = -decay
    assert_twins(delta_rule, naive_delta_rule, *streams)

    single = [x.float().requires_grad_() for x in streams]
    out = delta_rule(*single)
    assert out.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(out.sum(), single))
    torch.testing.assert_close(out, delta_rule(*streams).float(), rtol=0, atol=1e-4 if decay < 100 else 1e-2)


@gated
def test_nothing_builds_up_over_a_long_sequence_in_float32(gate):
    streams = inputs(997, gate=gate)
    if gate:
        streams = (*streams[:-1], streams[-1] / 100)
    expected = delta_rule(*streams)
    torch.testing.assert_close(delta_rule(*(x.float() for x in streams)), expected.float(), rtol=0, atol=1e-5)


@gated
def test_the_delta_rule_is_in_float32_under_autocast(gate):
    rough = [x.bfloat16() for x in inputs(997, gate=gate)]
    exact = delta_rule(*(x.float() for x in rough))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(delta_rule(*(x.float() for x in rough)), exact)
        assert torch.equal(delta_rule(*rough), exact.bfloat16())


@gated
def test_outputs_do_not_change_with_later_tokens(gate):
    streams = inputs(131, gate=gate)
    for i in (1, 65, 130):
        later = [torch.cat([x[:, :, :i], x[:, :, i:].flip(1)], dim=2) for x in streams]
        assert torch.equal(delta_rule(*streams)[:, :, :i], delta_rule(*later)[:, :, :i])
        assert not torch.equal(delta_rule(*streams)[:, :, i:], delta_rule(*later)[:, :, i:])


# What the rule means.


@both_forms
def test_orthonormal_keys_return_their_values(rule):
    length = 2 * CHUNK + 3
    keys, values = torch.eye(length).double()[None, None], normal(1, 1, length, length)
    earlier = torch.arange(length) // 2
    close(rule(keys[:, :, earlier], keys, values, torch.ones(1, 1, length).double()), values[:, :, earlier])


@both_forms
@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_a_value_under_a_key_that_is_written_again_moves_by_the_share_beta(rule, beta):
    length = 2 * CHUNK + 3
    key, values = F.normalize(normal(1, 1, 1, CHANNELS), dim=-1), normal(1, 1, length, CHANNELS, seed=1)
    out = rule(*[key.expand_as(values)] * 2, values, torch.full((1, 1, length), beta, dtype=torch.float64))
    held = torch.zeros(CHANNELS).double()
    for t in range(length):
        held = (1 - beta) * held + beta * values[0, 0, t]  # with beta = 1, the value itself
        close(out[0, 0, t], held)


@both_forms
def test_what_is_held_decays_and_what_is_written_does_not(rule):
    length = 2 * CHUNK + 3
    key, value = (F.normalize(normal(1, 1, 1, CHANNELS, seed=s), dim=-1).expand(1, 1, length, -1) for s in (0, 1))
    beta, log_decay = torch.zeros(1, 1, length).double(), -normal(1, 1, length).exp() / 20
    beta[..., 0] = 0.7
    kept = (log_decay[0, 0].cumsum(0) - log_decay[0, 0, 0]).exp()
    close(rule(key, key, value, beta, log_decay)[0, 0], 0.7 * kept[:, None] * value[0, 0])


@both_forms
def test_without_decay_the_gate_changes_nothing(rule):
    *streams, log_decay = inputs(67, gate=True)
    close(rule(*streams, torch.zeros_like(log_decay)), rule(*streams))


# The mixer.


@gated
def test_the_mixer_scales_filtered_keys_and_takes_its_rates_from_its_input(gate):
    mixer = build(q=2, k=3, gate=gate)
    plain = build(mixer="attention", q=2, k=3)
    plain.load_state_dict(mixer.state_dict(), strict=False)
    x = normal(BATCH, 41, WIDTH)
    q, k, v = plain.streams(plain.project(x))
    rates = [torch.sigmoid(x @ mixer.strength.weight.T).mT]
    if gate:
        step = torch.log1p(torch.exp(x @ mixer.step.weight.T + mixer.step.bias))
        rates.append((-mixer.log_rate.exp() * step).mT)
    heads = naive_delta_rule(q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True), v, *rates)
    close(mixer(x), heads.permute(0, 2, 1, 3).reshape(BATCH, 41, WIDTH) @ mixer.output.weight.T)


def test_a_gate_that_lets_everything_through_is_no_gate():
    gate, plain = build(gate=True, k=3), build(k=3)
    plain.load_state_dict({name: w for name, w in gate.state_dict().items() if name in plain.state_dict()})
    nn.init.constant_(gate.step.bias, -1000)
    close(gate(normal(BATCH, 41, WIDTH)), plain(normal(BATCH, 41, WIDTH)))


@gated
def test_every_weight_gets_a_gradient(gate):
    mixer = build(q=2, k=4, v="full", gate=gate)
    (mixer(normal(BATCH, 13, WIDTH)) * normal(BATCH, 13, WIDTH, seed=1)).sum().backward()
    for name, parameter in mixer.named_parameters():
        assert (parameter.grad != 0).all(), name


@gated
def test_the_mixer_agrees_with_float32_roughly_in_bfloat16(gate):
    mixer, x = build(k=3, gate=gate).float(), normal(BATCH, 131, WIDTH).float()
    with torch.autocast("cpu", torch.bfloat16):
        rough = mixer(x)
    assert (rough - mixer(x)).norm() < 0.02 * mixer(x).norm()


def test_the_gate_begins_with_the_rates_and_steps_of_mamba_2():
    mixer = build(width=2000, heads=1000, gate=True)
    rates, logs = mixer.log_rate.exp(), F.softplus(mixer.step.bias).log()
    assert [rates.min().item(), rates.max().item()] == pytest.approx([1, 16], abs=0.1)
    assert rates.mean().item() == pytest.approx(8.5, abs=0.5)
    assert [logs.min().item(), logs.max().item()] == pytest.approx([math.log(0.001), math.log(0.1)], abs=0.1)
    assert logs.mean().item() == pytest.approx(math.log(0.01), abs=0.15)


def test_a_key_reads_back_the_value_that_was_written_under_it():
    mixer = build()
    nn.init.constant_(mixer.strength.weight, 1000 / WIDTH)
    with torch.no_grad():
        mixer.projection.weight[:WIDTH] = mixer.projection.weight[WIDTH : 2 * WIDTH]
    x = 1 + normal(BATCH, 1, WIDTH).abs()
    _, _, v, *_ = mixer.streams(mixer.project(x))
    close(mixer(x), v[:, :, 0].flatten(1)[:, None] @ mixer.output.weight.T)
