"""Tests of the gated convolution."""

import pytest
import torch.nn.functional as F

from cat.mixers.gated_conv.config import GatedConvConfig
from cat.ops.conv.reference import naive_filter_channels
from tests.helpers.mixers import WIDTH, assert_uniform, build, hidden
from tests.helpers.reference import close


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize(("conv_size", "taps"), [(3, 3), ("full", 13)])
def test_the_layer_is_a_convolution_times_a_gate(conv_size, taps, gate):
    mixer, x = build({"mixer": "gated_conv", "conv_size": conv_size, "gate": gate}, 13), hidden(29)
    projected = x @ mixer.in_proj.weight.T + mixer.in_proj.bias
    u, *z = projected.split(2 * WIDTH, dim=-1)
    assert (mixer.convolution.kernel.shape, len(z)) == ((1, 2 * WIDTH, taps), int(gate))
    u = F.silu(naive_filter_channels(u[:, None], mixer.convolution.kernel)[:, 0])
    close(mixer(x), (u * z[0] if gate else u) @ mixer.o_proj.weight.T + mixer.o_proj.bias)


def test_every_weight_starts_as_published():
    """nn.Linear with biases, and nn.Conv1d without one."""
    mixer = build({"mixer": "gated_conv", "width": 1000}, 13)
    for linear in (mixer.in_proj, mixer.o_proj):
        assert_uniform(linear.weight, -(linear.in_features**-0.5), linear.in_features**-0.5)
        assert_uniform(linear.bias, -(linear.in_features**-0.5), linear.in_features**-0.5)
    assert_uniform(mixer.convolution.kernel, -(3**-0.5), 3**-0.5)
    assert mixer.convolution.bias is None


def test_its_name_says_whether_there_is_a_gate():
    assert [GatedConvConfig(gate=gate).title for gate in (True, False)] == ["Gated convolution", "Convolution"]


def test_a_kernel_longer_than_the_training_length_is_refused():
    with pytest.raises(ValueError, match="conv_size = 14 is longer than the training length of 13"):
        GatedConvConfig(conv_size=14).check_length(13)
