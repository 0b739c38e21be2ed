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

from cat.ops.common import autocast_to_compute_dtype
from cat.ops.conv import torch_backend
from cat.ops.conv.direct import DirectConvolution, backend_for, filter_direct, mix_direct, uses_numba
from cat.ops.conv.fft import filter_fft, mix_fft
from cat.ops.conv.toeplitz import filter_channels_toeplitz, filter_heads_toeplitz, mix_toeplitz, toeplitz
from cat.types import ChannelKernel, GroupedHeads, GroupedKernel, HeadKernel, HeadMixingKernel, Heads, Positions, Queries, Sources


class Limits(NamedTuple):
    """Which of three algorithms applies a filter. They agree to rounding; that of the FFT, unlike the others', is not causal.

    At most `taps` taps are summed as shifted copies, unless the sequence has at most `tokens` tokens and either fewer than `part`
    of them a tap, or numbers times tokens below `work`. Any other filter is a Toeplitz matrix up to `tokens` tokens, and applied
    by FFT beyond.
    """

    kernel_size: int
    tokens: int
    ratio: int = 0
    work: int = 0


class Tuning(NamedTuple):
    """The limits where shifted copies are summed by PyTorch and where by loops: measured on one CPU thread, with gradients."""

    torch: Limits
    numba: Limits

    def here(self, x: Tensor) -> Limits:
        """Those where `x` is; a kernel sums the taps of short sequences as well."""
        if uses_numba(x):
            return self.numba
        return self.torch if backend_for(x) is torch_backend else self.torch._replace(ratio=0)


MAX_MATRIX = 1024
"""The longest sequence for which the matrix of a filter is written out to take some of its rows."""
HEAD_LIMITS = Tuning(Limits(12, 128, ratio=24), Limits(32, 128, work=12 << 20))
CHANNEL_LIMITS = Tuning(Limits(12, 96, ratio=2), Limits(32, 96))
MIXING_LIMITS = Limits(12, 96, ratio=16)


def filter_heads(x: Heads, kernel: HeadKernel, *, dilation: int = 1) -> Heads:
    """Filters head h of `x` (B, H, L, C) along L with row h of `taps` (H, W); any W >= 1, longer than L too."""
    return _filter(x, kernel[:, None], dilation, HEAD_LIMITS.here(x), filter_direct, filter_heads_toeplitz, filter_fft)


def filter_heads_at(x: Heads, kernel: HeadKernel, positions: Positions, *, dilation: int = 1) -> Queries:
    """`filter_heads` at positions `at` alone: these rows of the filter's matrix times `x`."""
    length = x.shape[2]
    matrix = toeplitz(_within_length(kernel, length, dilation), length)
    rows = F.embedding(positions, matrix.transpose(0, 1).flatten(1)).unflatten(2, (len(kernel), length))
    return rows.transpose(1, 2) @ x


def is_sparse(x: Heads, positions: Positions) -> bool:
    """Whether `filter_heads_at` is faster than the filter at every position: its matrix must be small beside `x`."""
    return x.shape[2] <= MAX_MATRIX and 2 * positions.shape[1] <= x.shape[2]


def filter_channels(x: Heads, kernel: ChannelKernel, *, dilation: int = 1) -> Heads:
    """Filters channel c of head h of `x` (B, H, L, C) along L with `taps[h, c]`."""
    # Loops are faster than a small product a channel, however many the taps.
    by_matrix = functools.partial(filter_direct, dilation=1) if uses_numba(x) else filter_channels_toeplitz
    return _filter(x, kernel, dilation, CHANNEL_LIMITS.here(x), filter_direct, by_matrix, filter_fft)


def filter_groups(x: GroupedHeads, kernel: GroupedKernel, *, dilation: int = 1) -> tuple[Heads, ...]:
    """`filter_heads`, or `filter_channels`, of each of up to three groups, at once: faster if `few_taps`."""
    return tuple(
        y.squeeze(0)
        for y in DirectConvolution.apply(autocast_to_compute_dtype(x)[None], autocast_to_compute_dtype(kernel)[None], dilation)
    )


def is_short(x: Float[Tensor, "B L _"], kernel: Tensor, channels: int, *, dilation: int = 1) -> bool:
    """Whether taps (H, W) or (H, C, W) are so few that they are summed, for tokens of so many `channels` in all heads."""
    numbers = x.shape[0] * x.shape[1] * channels
    return _is_short(kernel, x.shape[1], numbers, dilation, (HEAD_LIMITS if kernel.dim() == 2 else CHANNEL_LIMITS).here(x))


def mix_heads(x: Sources, kernel: HeadMixingKernel, *, dilation: int = 1) -> Heads:
    """Head h of the outcome is the sum over heads g of `x` (B, G, L, C), filtered with `taps[h, g]`."""
    return _filter(x, kernel, dilation, MIXING_LIMITS, mix_direct, mix_toeplitz, mix_fft)


def dilate(kernel: Tensor, dilation: int) -> Tensor:
    """The same filter with every tap written out, those between two taps zero."""
    if dilation == 1:
        return kernel
    return F.pad(kernel[..., None], (0, dilation - 1)).flatten(-2)[..., : 1 - dilation]


def _filter(
    x: Sources,
    kernel: Tensor,
    dilation: int,
    limits: Limits,
    by_shifts: Callable[[Sources, Tensor, int], Heads],
    by_matrix: Callable[[Sources, Tensor], Heads],
    by_fft: Callable[[Sources, Tensor], Heads],
) -> Heads:
    x, kernel, length = autocast_to_compute_dtype(x), autocast_to_compute_dtype(kernel), x.shape[2]
    if _is_short(kernel, length, x.numel(), dilation, limits):
        return by_shifts(x, kernel, dilation)
    kernel = _within_length(kernel, length, dilation)
    return by_matrix(x, kernel) if length <= limits.tokens else by_fft(x, kernel)


def _within_length(kernel: Tensor, length: int, dilation: int) -> Tensor:
    """Every tap written out, but those that reach back beyond the first token."""
    return dilate(kernel[..., : -(-length // dilation)], dilation)


def _is_short(kernel: Tensor, length: int, numbers: int, dilation: int, limits: Limits) -> bool:
    """Whether they are summed as shifted copies."""
    width = kernel.shape[-1]
    by_matrix = length <= limits.tokens and (width * limits.ratio > length or numbers * length < limits.work)
    return width <= min(limits.kernel_size, -(-length // dilation)) and not by_matrix
