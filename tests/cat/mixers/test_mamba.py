"""Tests of Mamba: the selective scan, the kernel of mamba_ssm, and the mixer."""

import math
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from cat.mixers.mamba.op import MAX_CHUNK_ELEMENTS, fused_scan, naive_selective_scan, selective_scan, selective_scan_step
from cat.ops.conv.reference import naive_filter_heads
from tests.helpers.mixers import EXAMPLES, WIDTH, assert_uniform, build, hidden
from tests.helpers.reference import assert_matches_reference, close, in_parts, normal

both_backends = pytest.mark.usefixtures("backend")


@both_backends
@pytest.mark.parametrize("chunk", [1, 7, None])  # tokens
@pytest.mark.parametrize("length", [1, 2, 7, 8, 47])
def test_the_selective_scan_matches_its_reference_implementation(length, chunk, monkeypatch):
    if chunk is not None:
        monkeypatch.setitem(MAX_CHUNK_ELEMENTS, "cpu", chunk * 2 * 5 * 3)
    x, delta, a = normal(2, length, 5), normal(2, length, 5, seed=1).exp(), -normal(5, 3, seed=2).exp()
    inputs = x, delta, a, normal(2, length, 3, seed=3), normal(2, length, 3, seed=4)
    assert_matches_reference(selective_scan, naive_selective_scan, *inputs)
    with torch.no_grad():  # the states are not kept
        close(selective_scan(*inputs), naive_selective_scan(*inputs))


@both_backends
@pytest.mark.parametrize("parts", [[1] * 5, [9, 1, 20]], ids=str)
def test_the_selective_scan_continues_from_a_state(parts, monkeypatch):
    monkeypatch.setitem(MAX_CHUNK_ELEMENTS, "cpu", 7 * 2 * 5 * 3)
    length = sum(parts)
    x, delta, a = normal(2, length, 5), normal(2, length, 5, seed=1).exp(), -normal(5, 3, seed=2).exp()
    b, c = normal(2, length, 3, seed=3), normal(2, length, 3, seed=4)

    def stepwise(x, delta, a, b, c):
        def step(x, delta, b, c, state):
            return selective_scan_step(x, delta, a, b, c, state=state)

        return in_parts(step, (x, delta, b, c), parts, dim=1)[0]

    assert_matches_reference(stepwise, naive_selective_scan, x, delta, a, b, c)
    with torch.no_grad():  # the states are not kept
        close(stepwise(x, delta, a, b, c), naive_selective_scan(x, delta, a, b, c))


@pytest.fixture
def mamba_ssm(monkeypatch):
    """A fake mamba_ssm kernel: the reference scan in its layout, (B, E, L) and (B, S, L) for vectors, all of one dtype."""

    def kernel(u, delta, a, b, c):
        assert u.shape == delta.shape == (len(u), len(a), u.shape[2])
        assert b.shape == c.shape == (len(u), a.shape[1], u.shape[2])
        assert {t.dtype for t in (u, delta, b, c)} == {a.dtype}
        return naive_selective_scan(u.mT, delta.mT, a, b.mT, c.mT).mT

    monkeypatch.setitem(sys.modules, "mamba_ssm.ops.selective_scan_interface", SimpleNamespace(selective_scan_fn=kernel))
    fused_scan.cache_clear()
    yield kernel
    fused_scan.cache_clear()


def test_the_kernel_of_mamba_ssm_is_used_on_a_gpu_for_supported_states(mamba_ssm):
    assert fused_scan("cuda", torch.float32, 16) is mamba_ssm
    assert fused_scan("cuda", torch.float32, 256) is mamba_ssm
    assert fused_scan("cuda", torch.float32, 257) is None
    assert fused_scan("cuda", torch.float64, 16) is None
    assert fused_scan("cpu", torch.float32, 16) is None


def test_without_mamba_ssm_no_kernel_is_used(mamba_ssm, monkeypatch):
    monkeypatch.setitem(sys.modules, "mamba_ssm.ops.selective_scan_interface", None)  # as if it is not installed
    assert fused_scan("cuda", torch.float32, 16) is None


def test_the_kernel_of_mamba_ssm_gets_its_own_layout(mamba_ssm, monkeypatch):
    calls = []
    monkeypatch.setattr("cat.mixers.mamba.op.fused_scan", lambda *arguments: calls.append(arguments) or mamba_ssm)
    x, delta, a = normal(2, 7, 5), normal(2, 7, 5, seed=1).exp(), -normal(5, 3, seed=2).exp()
    b, c = normal(2, 7, 3, seed=3), normal(2, 7, 3, seed=4)
    assert_matches_reference(selective_scan, naive_selective_scan, x, delta, a, b, c)
    assert calls == [("cpu", torch.float64, 3)]

    rough = [t.bfloat16() for t in (x, delta, b, c)]
    exact = [t.double() for t in rough]
    close(selective_scan(*rough[:2], a, *rough[2:]), naive_selective_scan(*exact[:2], a, *exact[2:]))


def test_a_state_without_decay_is_a_sum():
    x, ones = normal(2, 37, 5), torch.ones(2, 37, 1).double()
    close(selective_scan(x, torch.ones_like(x), torch.zeros(5, 1).double(), ones, ones), x.cumsum(1))


def test_mamba_starts_with_the_rates_and_steps_of_its_paper():
    mixer = build({"mixer": "mamba", "width": 1000}, 13)
    torch.testing.assert_close(-mixer.log_rate.exp(), -torch.arange(1.0, 17.0).double().expand(2000, 16))
    assert (mixer.skip == 1).all()
    assert_uniform(F.softplus(mixer.dt_proj.bias).log(), math.log(0.001), math.log(0.1))
    assert_uniform(mixer.dt_proj.weight, -(63**-0.5), 63**-0.5)  # the rank of the steps is 1000 / 16, rounded up
    assert_uniform(mixer.convolution.weight, -(4**-0.5), 4**-0.5)
    assert_uniform(mixer.convolution.bias, -(4**-0.5), 4**-0.5)
    for linear in (mixer.in_proj, mixer.selection, mixer.o_proj):
        assert linear.bias is None
        assert_uniform(linear.weight, -(linear.in_features**-0.5), linear.in_features**-0.5)


def test_mamba_has_its_configured_sizes():
    mixer = build({"mixer": "mamba", "expand": 3, "state": 5, "conv_size": 7}, 13)
    assert mixer.log_rate.shape == (3 * WIDTH, 5)
    assert mixer.convolution.weight.shape == (3 * WIDTH, 1, 7)


def test_a_state_has_the_precision_of_the_weights():
    ones = torch.ones(1, 8191, 1, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        sums = selective_scan(ones, ones, torch.zeros(1, 1), ones, ones)
    assert sums[0, -1].item() == pytest.approx(8191, rel=0.01)  # in bfloat16, 4096 + 16 is 4096


def test_mamba_has_a_gate_a_skip_connection_and_a_convolution():
    mixer = build(EXAMPLES["mamba"], 13)
    x = hidden(13)
    u, gate = (x @ mixer.in_proj.weight.T).chunk(2, dim=-1)
    kernel = mixer.convolution.weight[:, 0].flip(1)  # PyTorch's conv1d is a correlation: its last value is lag 0
    u = F.silu(naive_filter_heads(u.mT[..., None], kernel)[..., 0].mT + mixer.convolution.bias)
    step, b, c = (u @ mixer.selection.weight.T).split([2, 16, 16], dim=-1)
    delta = F.softplus(step @ mixer.dt_proj.weight.T + mixer.dt_proj.bias)
    y = naive_selective_scan(u, delta, -mixer.log_rate.exp(), b, c) + mixer.skip * u
    close(mixer(x), (y * F.silu(gate)) @ mixer.o_proj.weight.T)
