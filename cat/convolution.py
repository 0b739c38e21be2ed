"""Causal filters: y_i = sum_{j < W} F_j x_{i-j}, with zeros before the first token (arXiv 2407.05591, section 2).

One filter a head: every channel of the head has the same taps, so that filtering commutes with the projection of the head.
"""

import torch
import torch.nn.functional as F

from cat.types import HeadFilter, Heads


def filter_heads(x: Heads, taps: HeadFilter) -> Heads:
    """Filters head h of `x` (B, H, L, C) along L with row h of `taps` (H, W); any W >= 1, longer than L too.

    Few taps over a long sequence are summed as shifted copies, many as a banded Toeplitz matrix, very many by FFT. The three
    agree to rounding; which one runs depends on the shapes alone.
    """
    length, width = x.shape[2], min(taps.shape[1], x.shape[2])
    taps = taps[:, :width]
    if length > 12 * width:
        return _by_shifts(x, taps)
    return toeplitz(taps, length) @ x if length <= 256 else _by_fft(x, taps)


def naive_filter_heads(x: Heads, taps: HeadFilter) -> Heads:
    """The definition, one output and one tap at a time; the twin that `filter_heads` is tested against."""
    outputs = []
    for i in range(x.shape[2]):
        reach = range(min(taps.shape[1], i + 1))
        outputs.append(torch.stack([taps[:, j, None] * x[:, :, i - j] for j in reach]).sum(0))
    return torch.stack(outputs, dim=2)


def toeplitz(taps: HeadFilter, length: int) -> torch.Tensor:
    """The matrices T (H, L, L) with T[h, i, i - j] = taps[h, j]: a filter as a causal linear map."""
    # Windows of [0 .. 0, F_0 .. F_{W-1}, 0 .. 0], each one step further than the last; reversed, they are the rows of T.
    padded = F.pad(taps, (length - 1, length - taps.shape[1]))
    return padded.unfold(1, length, 1).flip(2)


def _by_shifts(x: Heads, taps: HeadFilter) -> Heads:
    y = x * taps[:, 0, None, None]
    for j in range(1, taps.shape[1]):
        y = y + F.pad(x[:, :, :-j] * taps[:, j, None, None], (0, 0, j, 0))
    return y


def _by_fft(x: Heads, taps: HeadFilter) -> Heads:
    length = x.shape[2]
    size = length + taps.shape[1] - 1
    spectrum = torch.fft.rfft(x, n=size, dim=2) * torch.fft.rfft(taps, n=size)[:, :, None]
    return torch.fft.irfft(spectrum, n=size, dim=2)[:, :, :length]
