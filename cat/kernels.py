"""Triton kernels for a GPU: a causal filter of a few taps in one pass over the sequence, where PyTorch takes one a tap.

Tensors have an axis of groups in front, each with taps of its own: x (G, B, H, L, C), taps (G, H, 1 or C, W). A view, such as
a slice of a projection, is read where it lies. Sums are in float32, those of float64 numbers in float64.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from cat.types import GroupedFilter, GroupedHeads

TOKENS, CHANNELS, WARPS = 32, 64, 2
"""Of the tile that a program computes, at most; and the warps that compute it."""


def filter_groups(x: GroupedHeads, taps: GroupedFilter, dilation: int) -> GroupedHeads:
    """y_i = sum_{j < W} taps_j x_{i - j dilation}, with zeros before the first token."""
    tiles = _Tiles.of(x)
    y = _token_by_token(x, torch.promote_types(x.dtype, taps.dtype))
    of_a_channel = taps.stride(2) if taps.shape[2] > 1 else 0
    _filter[tiles.grid](
        x, taps, y, *x.shape[1:], dilation, *x.stride(), *taps.stride()[:2], of_a_channel, taps.stride(3), *y.stride(),
        taps.shape[3], tiles.tokens, tiles.channels, _sum_in(y), num_warps=WARPS,
    )  # fmt: skip
    return y


def filter_gradients(
    x: GroupedHeads, taps: GroupedFilter, gradient: GroupedHeads, dilation: int
) -> tuple[GroupedHeads, GroupedFilter]:
    """Those of x and of the taps, given that of the outcome. They repeat to the bit: every tile has sums of its own."""
    tiles = _Tiles.of(x)
    shared = taps.shape[2] == 1
    of_x = _token_by_token(x, x.dtype)
    columns = tiles.grid[2] if shared else x.shape[4]
    sums = taps.new_empty(*x.shape[:3], tiles.grid[1], taps.shape[3], columns)
    of_a_channel = 0 if shared else taps.stride(2)
    _gradients[tiles.grid](
        x, taps, gradient, of_x, sums, *x.shape[1:], dilation, *x.stride(), *taps.stride()[:2], of_a_channel, taps.stride(3),
        *gradient.stride(), *of_x.stride(), columns, taps.shape[3], tiles.tokens, tiles.channels, _sum_in(gradient), shared,
        num_warps=WARPS,
    )  # fmt: skip
    of_taps = sums.sum((1, 3)).mT
    return of_x, of_taps.sum(2, keepdim=True) if shared else of_taps


class _Tiles(NamedTuple):
    """How the work is cut: programs by sequences and heads, tokens, channels; and the size of a tile."""

    grid: tuple[int, int, int]
    tokens: int
    channels: int

    @classmethod
    def of(cls, x: GroupedHeads) -> "_Tiles":
        groups, batch, heads, length, width = x.shape
        tokens = min(TOKENS, triton.next_power_of_2(length))
        channels = min(CHANNELS, triton.next_power_of_2(width))
        return cls((groups * batch * heads, triton.cdiv(length, tokens), triton.cdiv(width, channels)), tokens, channels)


def _token_by_token(x: GroupedHeads, dtype: torch.dtype) -> GroupedHeads:
    """Memory for as many numbers, in the order in which projections have them: (G, B, L, H, C)."""
    return x.new_empty([x.shape[axis] for axis in (0, 1, 3, 2, 4)], dtype=dtype).transpose(2, 3)


def _sum_in(x: Tensor) -> tl.dtype:
    return tl.float64 if x.dtype == torch.float64 else tl.float32


@triton.jit
def _filter(
    x, taps, y, batch, heads, length, width, dilation,
    x_g, x_b, x_h, x_l, x_c, t_g, t_h, t_c, t_w, y_g, y_b, y_h, y_l, y_c,
    W: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    g, b, h = row // (batch * heads), row // heads % batch, row % heads
    i = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    c = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    x += g * x_g + b * x_b + h * x_h
    taps += g * t_g + h * t_h
    total = tl.zeros((TOKENS, CHANNELS), SUM)
    for j in tl.static_range(W):
        at = i - j * dilation
        seen = ((at >= 0) & (at < length))[:, None] & (c < width)[None, :]
        rows = tl.load(x + at[:, None] * x_l + c[None, :] * x_c, mask=seen, other=0).to(SUM)
        total += rows * tl.load(taps + c * t_c + j * t_w, mask=c < width, other=0).to(SUM)[None, :]
    there = (i < length)[:, None] & (c < width)[None, :]
    tl.store(y + g * y_g + b * y_b + h * y_h + i[:, None] * y_l + c[None, :] * y_c, total, mask=there)


@triton.jit
def _gradients(
    x, taps, of_y, of_x, sums, batch, heads, length, width, dilation,
    x_g, x_b, x_h, x_l, x_c, t_g, t_h, t_c, t_w, y_g, y_b, y_h, y_l, y_c, d_g, d_b, d_h, d_l, d_c, columns,
    W: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr, SUM: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    g, b, h = row // (batch * heads), row // heads % batch, row % heads
    i = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    c = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    x += g * x_g + b * x_b + h * x_h
    of_y += g * y_g + b * y_b + h * y_h
    taps += g * t_g + h * t_h
    sums += (row * tl.num_programs(1) + tl.program_id(1)) * W * columns
    there = (i < length)[:, None] & (c < width)[None, :]
    own = tl.load(of_y + i[:, None] * y_l + c[None, :] * y_c, mask=there, other=0).to(SUM)
    total = tl.zeros((TOKENS, CHANNELS), SUM)
    for j in tl.static_range(W):
        later, before = i + j * dilation, i - j * dilation
        reached = (later < length)[:, None] & (c < width)[None, :]
        rows = tl.load(of_y + later[:, None] * y_l + c[None, :] * y_c, mask=reached, other=0).to(SUM)
        total += rows * tl.load(taps + c * t_c + j * t_w, mask=c < width, other=0).to(SUM)[None, :]
        seen = there & (before >= 0)[:, None]
        products = own * tl.load(x + before[:, None] * x_l + c[None, :] * x_c, mask=seen, other=0).to(SUM)
        if SHARED:
            tl.store(sums + j * columns + tl.program_id(2), tl.sum(products))
        else:
            tl.store(sums + j * columns + c, tl.sum(products, 0), mask=c < width)
    tl.store(of_x + g * d_g + b * d_b + h * d_h + i[:, None] * d_l + c[None, :] * d_c, total, mask=there)
