"""Filters: every algorithm against the definition, for every way to share taps."""

import pytest
import torch

from cat import convolution
from cat.convolution import (
    _fast_size,
    filter_channels,
    filter_groups,
    filter_heads,
    filter_heads_at,
    mix_heads,
    naive_filter_channels,
    naive_filter_heads,
    naive_mix_heads,
    toeplitz,
)
from cat.position import take
from cat.shifts import NUMBERS_AT_ONCE
from tests.twins import assert_twins, close, normal

BATCH, HEADS, CHANNELS = 2, 3, 5
KINDS = {
    "head": (filter_heads, naive_filter_heads, (HEADS,), {"shifts": "_by_shifts", "fft": "_by_fft"}),
    "channel": (filter_channels, naive_filter_channels, (HEADS, CHANNELS), {"shifts": "_by_shifts", "fft": "_by_fft"}),
    "mixing": (mix_heads, naive_mix_heads, (HEADS, HEADS), {"shifts": "_mix_by_shifts", "fft": "_mix_by_fft"}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("length", "width", "dilation", "algorithm"),
    [
        (1, 1, 1, "toeplitz"),
        (1, 7, 3, "toeplitz"),
        (5, 11, 1, "toeplitz"),
        (19, 11, 1, "toeplitz"),
        (7, 4, 2, "toeplitz"),
        (19, 9, 4, "toeplitz"),  # half of the taps reach past the first token
        (67, 1, 1, "shifts"),
        (83, 3, 3, "shifts"),
        (131, 2, 1, "shifts"),
        (131, 2, 11, "shifts"),
        (131, 37, 1, "fft"),
        (131, 17, 6, "fft"),
        (131, 137, 1, "fft"),
    ],
)
def test_every_algorithm_is_the_definition(kind, length, width, dilation, algorithm, monkeypatch):
    fast, naive, rows, names = KINDS[kind]
    if algorithm == "fft" and kind == "channel":  # the naive twin goes channel by channel: one of them is enough here
        rows = (HEADS, 1)
    channels = rows[1] if kind == "channel" else CHANNELS
    called = []
    for name in ("toeplitz", "_by_shifts", "_by_fft", "_mix_by_shifts", "_mix_by_fft"):
        original = getattr(convolution, name)
        monkeypatch.setattr(convolution, name, lambda *args, n=name, f=original: called.append(n) or f(*args))
    assert_twins(
        lambda x, taps: fast(x, taps, dilation=dilation),
        lambda x, taps: naive(x, taps, dilation=dilation),
        normal(BATCH, HEADS, length, channels),
        normal(*rows, width, seed=1),
    )
    assert called == [names.get(algorithm, algorithm)]


@pytest.mark.parametrize(("length", "width", "dilation"), [(1, 1, 1), (5, 11, 1), (19, 4, 1), (19, 4, 3), (19, 9, 4), (67, 3, 1)])
def test_a_filter_at_some_positions_is_the_definition_there(length, width, dilation):
    at = torch.tensor([[0, length // 2, length - 1], [length // 3, length // 3, length - 1]])
    assert_twins(
        lambda x, taps: filter_heads_at(x, taps, at, dilation=dilation),
        lambda x, taps: take(naive_filter_heads(x, taps, dilation=dilation), at),
        normal(BATCH, HEADS, length, CHANNELS),
        normal(HEADS, width, seed=1),
    )


@pytest.mark.parametrize("tokens", [1, 40, 47, 83, 2 * 83, 3 * 83])
@pytest.mark.parametrize("channels", [1, CHANNELS])
def test_groups_are_filtered_a_few_tokens_at_a_time(tokens, channels, monkeypatch):
    length, groups, dilation = 83, 2, 20  # the last of three taps reaches back 40 tokens
    monkeypatch.setitem(NUMBERS_AT_ONCE, "cpu", tokens * groups * HEADS * CHANNELS)
    assert_twins(
        lambda x, taps: torch.stack(filter_groups(x, taps, dilation=dilation)),
        lambda x, taps: torch.stack(
            [
                naive_filter_channels(own, rows.expand(-1, CHANNELS, -1), dilation=dilation)
                for own, rows in zip(x, taps, strict=True)
            ]
        ),
        normal(groups, 3, HEADS, length, CHANNELS),
        normal(groups, HEADS, channels, 3, seed=1),
    )


@pytest.mark.parametrize("width", [1, 3, 7])
def test_toeplitz_holds_the_taps_on_its_diagonals(width):
    length, taps = 7, normal(HEADS, width)
    matrices = toeplitz(taps, length)
    for i in range(length):
        for j in range(length):
            expected = taps[:, i - j] if 0 <= i - j < width else torch.zeros(HEADS)
            assert matrices[:, i, j].tolist() == expected.tolist()


def test_filters_do_not_mix_heads_channels_or_rows():
    x, taps = normal(BATCH, HEADS, 11, CHANNELS), normal(HEADS, 3, seed=1)
    alone = filter_heads(x[1:, 2:, :, 4:], taps[2:])
    close(filter_heads(x, taps)[1:, 2:, :, 4:], alone)


def test_a_filter_a_channel_with_equal_taps_is_a_filter_a_head():
    x, taps = normal(BATCH, HEADS, 11, CHANNELS), normal(HEADS, 3, seed=1)
    close(filter_channels(x, taps[:, None].expand(-1, CHANNELS, -1)), filter_heads(x, taps))


def test_mixing_reads_the_head_that_its_taps_name():
    x, taps = normal(BATCH, HEADS, 11, CHANNELS), torch.zeros(HEADS, HEADS, 2).double()
    taps[0, 2, 1] = 1.0  # head 0 is head 2, one token late
    y = mix_heads(x, taps)
    close(y[:, 0, 1:], x[:, 2, :-1])
    assert not y[:, 1:].any()
    assert not y[:, 0, 0].any()


@pytest.mark.parametrize(("length", "width"), [(83, 3), (19, 7), (131, 37)])
def test_other_heads_can_be_mixed_than_come_out(length, width):
    taps = normal(HEADS, 2 * HEADS, width, seed=1)
    assert_twins(mix_heads, naive_mix_heads, normal(BATCH, 2 * HEADS, length, CHANNELS), taps)


def test_mixing_has_gradients_under_autocast():
    x, taps = (t.float().requires_grad_() for t in (normal(BATCH, HEADS, 83, CHANNELS), normal(HEADS, HEADS, 4, seed=1)))
    exact = torch.autograd.grad(mix_heads(x, taps).square().sum(), (x, taps))
    with torch.autocast("cpu", torch.bfloat16):
        y = mix_heads(x, taps)
    for rough, gradient in zip(torch.autograd.grad(y.float().square().sum(), (x, taps)), exact, strict=True):
        assert (rough - gradient).norm() < 0.02 * gradient.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_filtered_by_fft_has_its_channels_side_by_side(kind):
    filtered, _, rows, _ = KINDS[kind]
    assert filtered(normal(BATCH, HEADS, 131, CHANNELS), normal(*rows, 37, seed=1)).is_contiguous()


def test_taps_are_dilation_tokens_apart():
    x, taps = normal(BATCH, HEADS, 11, CHANNELS), torch.tensor([0.0, 0.0, 1.0]).double().expand(HEADS, -1)
    y = filter_heads(x, taps, dilation=4)
    close(y[:, :, 8:], x[:, :, :-8])
    assert not y[:, :, :8].any()


def test_fourier_transforms_have_a_fast_size():
    assert [_fast_size(n) for n in (1, 2, 3, 7, 71, 103, 511, 8191)] == [1, 2, 3, 8, 72, 120, 512, 8192]
