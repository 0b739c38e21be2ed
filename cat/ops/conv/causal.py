"""Causal filters: y_i = sum_{j < W} F_j x_{i - j dilation}, with zeros before the first token (arXiv 2407.05591, section 2).

One filter a head has the same taps for every channel of it, so that filtering commutes with the projection of the head. One
filter a channel is the depthwise convolution; filters from every head to every head are those of multi-head CAT.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from cat.ops.common import operand
from cat.ops.conv import torch_backend
from cat.ops.conv.direct import _Shifts, backend_for, filter_direct, mix_direct, uses_numba
from cat.ops.conv.fft import filter_fft, mix_fft
from cat.ops.conv.toeplitz import filter_channels_toeplitz, filter_heads_toeplitz, mix_toeplitz, toeplitz
from cat.types import Asked, ChannelFilter, GroupedFilter, GroupedHeads, HeadFilter, HeadMixingFilter, Heads, Queries, Sources


class Limits(NamedTuple):
    """Which of three algorithms applies a filter. They agree to rounding; that of the FFT, unlike the others', is not causal.

    At most `taps` taps are summed as shifted copies, unless the sequence has at most `tokens` tokens and either fewer than `part`
    of them a tap, or numbers times tokens below `work`. Any other filter is a Toeplitz matrix up to `tokens` tokens, and applied
    by FFT beyond.
    """

    taps: int
    tokens: int
    part: int = 0
    work: int = 0


class Tuning(NamedTuple):
    """The limits where shifted copies are summed by PyTorch and where by loops: measured on one CPU thread, with gradients."""

    passes: Limits
    loops: Limits

    def here(self, x: Tensor) -> Limits:
        """Those where `x` is; a kernel sums the taps of short sequences as well."""
        if uses_numba(x):
            return self.loops
        return self.passes if backend_for(x) is torch_backend else self.passes._replace(part=0)


MATRIX = 1024
"""The longest sequence for which the matrix of a filter is written out to take some of its rows."""
OF_HEADS = Tuning(Limits(12, 128, part=24), Limits(32, 128, work=12 << 20))
OF_CHANNELS = Tuning(Limits(12, 96, part=2), Limits(32, 96))
OF_MIXING = Limits(12, 96, part=16)


def filter_heads(x: Heads, taps: HeadFilter, *, dilation: int = 1) -> Heads:
    """Filters head h of `x` (B, H, L, C) along L with row h of `taps` (H, W); any W >= 1, longer than L too."""
    return _filter(x, taps[:, None], dilation, OF_HEADS.here(x), filter_direct, filter_heads_toeplitz, filter_fft)


def filter_heads_at(x: Heads, taps: HeadFilter, at: Asked, *, dilation: int = 1) -> Queries:
    """`filter_heads` at positions `at` alone: these rows of the filter's matrix times `x`."""
    length = x.shape[2]
    matrix = toeplitz(_reaching(taps, length, dilation), length)
    rows = F.embedding(at, matrix.transpose(0, 1).flatten(1)).unflatten(2, (len(taps), length))
    return rows.transpose(1, 2) @ x


def few(x: Heads, at: Asked) -> bool:
    """Whether `filter_heads_at` is faster than the filter at every position: its matrix must be small beside `x`."""
    return x.shape[2] <= MATRIX and 2 * at.shape[1] <= x.shape[2]


def filter_channels(x: Heads, taps: ChannelFilter, *, dilation: int = 1) -> Heads:
    """Filters channel c of head h of `x` (B, H, L, C) along L with `taps[h, c]`."""
    # Loops are faster than a small product a channel, however many the taps.
    by_matrix = functools.partial(filter_direct, dilation=1) if uses_numba(x) else filter_channels_toeplitz
    return _filter(x, taps, dilation, OF_CHANNELS.here(x), filter_direct, by_matrix, filter_fft)


def filter_groups(x: GroupedHeads, taps: GroupedFilter, *, dilation: int = 1) -> tuple[Heads, ...]:
    """`filter_heads`, or `filter_channels`, of each of up to three groups, at once: faster if `few_taps`."""
    return tuple(y.squeeze(0) for y in _Shifts.apply(operand(x)[None], operand(taps)[None], dilation))


def few_taps(x: Float[Tensor, "B L _"], taps: Tensor, channels: int, *, dilation: int = 1) -> bool:
    """Whether taps (H, W) or (H, C, W) are so few that they are summed, for tokens of so many `channels` in all heads."""
    numbers = x.shape[0] * x.shape[1] * channels
    return _short(taps, x.shape[1], numbers, dilation, (OF_HEADS if taps.dim() == 2 else OF_CHANNELS).here(x))


def mix_heads(x: Sources, taps: HeadMixingFilter, *, dilation: int = 1) -> Heads:
    """Head h of the outcome is the sum over heads g of `x` (B, G, L, C), filtered with `taps[h, g]`."""
    return _filter(x, taps, dilation, OF_MIXING, mix_direct, mix_toeplitz, mix_fft)


def spaced(taps: Tensor, dilation: int) -> Tensor:
    """The same filter with every tap written out, those between two taps zero."""
    if dilation == 1:
        return taps
    return F.pad(taps[..., None], (0, dilation - 1)).flatten(-2)[..., : 1 - dilation]


def _filter(
    x: Sources,
    taps: Tensor,
    dilation: int,
    limits: Limits,
    by_shifts: Callable[[Sources, Tensor, int], Heads],
    by_matrix: Callable[[Sources, Tensor], Heads],
    by_fft: Callable[[Sources, Tensor], Heads],
) -> Heads:
    x, taps, length = operand(x), operand(taps), x.shape[2]
    if _short(taps, length, x.numel(), dilation, limits):
        return by_shifts(x, taps, dilation)
    taps = _reaching(taps, length, dilation)
    return by_matrix(x, taps) if length <= limits.tokens else by_fft(x, taps)


def _reaching(taps: Tensor, length: int, dilation: int) -> Tensor:
    """Every tap written out, but those that reach back beyond the first token."""
    return spaced(taps[..., : -(-length // dilation)], dilation)


def _short(taps: Tensor, length: int, numbers: int, dilation: int, limits: Limits) -> bool:
    """Whether they are summed as shifted copies."""
    width = taps.shape[-1]
    by_matrix = length <= limits.tokens and (width * limits.part > length or numbers * length < limits.work)
    return width <= min(limits.taps, -(-length // dilation)) and not by_matrix
