"""Tests of Hyena."""

import math

import pytest
import torch
from torch import nn

from cat.ops.conv.reference import naive_filter_channels
from tests.helpers.mixers import EXAMPLES, WIDTH, assert_uniform, build, hidden
from tests.helpers.reference import close, normal


def test_hyena_is_a_gated_long_convolution_after_a_short_one():
    mixer, x = build(EXAMPLES["hyena"], 13), hidden(29)
    projected = x @ mixer.in_proj.weight.T + mixer.in_proj.bias
    convolved = naive_filter_channels(projected[:, None], mixer.short.kernel)[:, 0] + mixer.short.bias.flatten()
    q, k, v = convolved.split(WIDTH, dim=-1)
    long = naive_filter_channels((k * v)[:, None], mixer.long.response(29))[:, 0]
    close(mixer(x), (q * long) @ mixer.o_proj.weight.T + mixer.o_proj.bias)


def test_the_long_kernel_is_a_network_of_the_lag_times_a_decay():
    """The formula of the authors' code, here with two bands of frequencies, also beyond the training length."""
    filter_ = build({**EXAMPLES["hyena"], "filter_features": 5, "filter_size": 7}, 13).long
    filter_.frequency.data.copy_(normal(7))
    for j, actual in enumerate(filter_.generate(17).unbind(-1)):
        t = j / 12
        angles = [2 * math.pi * j / 13 * band for band in (1e-4, 1.0)]
        z = torch.tensor([t, *map(math.cos, angles), *(-math.sin(angle) for angle in angles)], dtype=torch.float64)
        for layer in filter_.hidden:
            z = torch.sin(filter_.frequency * (layer.weight @ z + layer.bias))
        rates = -math.log(1e-2) / torch.linspace(1 / 1.5, 1 / 0.3, WIDTH, dtype=torch.float64).reciprocal()
        expected = filter_.out.weight @ z * torch.exp(-t * rates) + (filter_.direct[0] if j == 0 else 0)
        torch.testing.assert_close(actual[0], expected, rtol=1e-5, atol=1e-6)  # the constants are set in float32


@pytest.mark.parametrize("width", [1000])
def test_every_weight_starts_as_published(width):
    """nn.Linear and nn.Conv1d with biases, frequencies 1, D of N(0, 1), three hidden layers of 64 for 3 features."""
    mixer = build({"mixer": "hyena", "width": width}, 13)
    for linear in (mixer.in_proj, mixer.o_proj):
        assert_uniform(linear.weight, -(width**-0.5), width**-0.5)
        assert_uniform(linear.bias, -(width**-0.5), width**-0.5)
    for weight in (mixer.short.kernel, mixer.short.bias):
        assert_uniform(weight, -(3**-0.5), 3**-0.5)
    assert [tuple(layer.weight.shape) for layer in mixer.long.hidden] == [(64, 3), (64, 64), (64, 64)]
    for layer in (*mixer.long.hidden[1:], mixer.long.out):
        assert_uniform(layer.weight, -1 / 8, 1 / 8)
    assert (mixer.long.frequency == 1).all()
    shares = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    quantiles = torch.distributions.Normal(0.0, 1.0).icdf(shares)
    torch.testing.assert_close(torch.quantile(mixer.long.direct.detach(), shares), quantiles, rtol=0, atol=0.15)
    decays = torch.exp(-mixer.long.rates)  # at the end of the training length
    assert [decays[0].item() ** 1.5, decays[-1].item() ** 0.3] == pytest.approx([1e-2, 1e-2], rel=1e-4)
    assert isinstance(mixer.long.out, nn.Linear)
    assert mixer.long.out.bias is None
