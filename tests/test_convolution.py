"""Filters: the three algorithms against the definition."""

import pytest
import torch

from cat import convolution
from cat.convolution import filter_heads, naive_filter_heads, toeplitz
from tests.twins import assert_twins, close, normal

BATCH, HEADS, CHANNELS = 2, 3, 5


@pytest.mark.parametrize(
    ("length", "width", "algorithm"),
    [
        (1, 1, "toeplitz"),
        (1, 7, "toeplitz"),
        (5, 11, "toeplitz"),
        (19, 7, "toeplitz"),
        (13, 1, "_by_shifts"),
        (37, 3, "_by_shifts"),
        (257, 29, "_by_fft"),
        (257, 263, "_by_fft"),
    ],
)
def test_every_algorithm_is_the_definition(length, width, algorithm, monkeypatch):
    called = []
    for name in ("toeplitz", "_by_shifts", "_by_fft"):
        original = getattr(convolution, name)
        monkeypatch.setattr(convolution, name, lambda *args, n=name, f=original: called.append(n) or f(*args))
    assert_twins(filter_heads, naive_filter_heads, normal(BATCH, HEADS, length, CHANNELS), normal(HEADS, width, seed=1))
    assert called == [algorithm]


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
