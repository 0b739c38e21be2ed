"""Tests of Hyena."""

import torch

from cat.ops.conv.reference import naive_filter_channels
from tests.helpers.mixers import EXAMPLES, WIDTH, build, hidden
from tests.helpers.reference import close


def test_hyena_is_a_gated_long_convolution_after_a_short_one():
    mixer, x = build(EXAMPLES["hyena"], 13), hidden(29)
    convolved = naive_filter_channels((x @ mixer.in_proj.weight.T)[:, None], mixer.short.kernel)[:, 0]
    q, k, v = convolved.split(WIDTH, dim=-1)
    long = naive_filter_channels((k * v)[:, None], mixer.long.response(29))[:, 0]
    close(mixer(x), (q * long) @ mixer.o_proj.weight.T)


def test_hyena_starts_with_a_short_identity_kernel_and_a_long_random_kernel_per_channel():
    mixer = build({**EXAMPLES["hyena"], "conv_size": 4}, 13)
    assert mixer.short.kernel.shape == (1, 3 * WIDTH, 4)
    assert ((mixer.short.kernel - torch.eye(4)[0]).abs() < 0.3).all()
    assert mixer.long.response(29).shape == (1, WIDTH, 29)
    assert not mixer.long.direct.any()
