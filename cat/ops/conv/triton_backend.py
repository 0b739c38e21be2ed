"""Triton kernels for a GPU: a causal filter of a few taps in one pass over the sequence, where PyTorch takes one a tap.

Tensors have two axes in front, of replicas and of groups, all with taps of their own: x (R, G, B, H, L, C), taps
(R, G, H, 1 or C, W). A view, such as a slice of a projection, is read where it lies, and what is made of it lies in the same
order. Sums are in float32, those of float64 numbers in float64.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from cat.types import Replicated, StackedHeads, StackedKernel

TOKENS, CHANNELS, WARPS = 32, 32, 1
"""Of the tile that a program computes, at most; and the warps that compute it."""


def filter_stacks(x: StackedHeads, kernel: StackedKernel, dilation: int) -> StackedHeads:
    """y_i = sum_{j < W} taps_j x_{i - j dilation}, with zeros before the first token."""
    tiles = _Tiles.of(x)
    y = torch.empty_like(x, dtype=torch.promote_types(x.dtype, kernel.dtype))
    _filter[tiles.grid](
        x, kernel, y, *x.shape[1:], dilation, *x.stride(), *_strides(kernel), *y.stride(),
        kernel.shape[4], tiles.tokens, tiles.channels, _sum_in(y), _count_in(x, y), num_warps=WARPS,
    )  # fmt: skip
    return y


def filter_gradients(
    x: StackedHeads, kernel: StackedKernel, gradients: Sequence[Replicated], dilation: int
) -> tuple[StackedHeads, StackedKernel]:
    """Those of x and of the taps, given one of the outcome of each of up to three groups.

    They repeat to the bit: every tile has sums of its own.
    """
    assert len(gradients) <= 3, "a kernel has three pointers for them"
    if len({gradient.stride() for gradient in gradients}) > 1:
        gradients = torch.stack(list(gradients)).unbind()
    first, second, third = (*gradients, gradients[0], gradients[0])[:3]
    tiles = _Tiles.of(x)
    shared = kernel.shape[3] == 1
    of_x = torch.empty_like(x)
    columns = tiles.grid[2] if shared else x.shape[5]
    wide = torch.promote_types(kernel.dtype, torch.float32)
    replicas, groups, batch, heads = x.shape[:4]
    sums = kernel.new_empty(replicas, groups, heads, kernel.shape[4], batch, tiles.grid[1], columns, dtype=wide)
    _gradients[tiles.grid](
        x, kernel, first, second, third, of_x, sums, *x.shape[1:], dilation, *x.stride(), *_strides(kernel), *first.stride(),
        *of_x.stride(), *sums.stride()[:-1],
        kernel.shape[4], tiles.tokens, tiles.channels, _sum_in(first), shared, _count_in(x, first, of_x), num_warps=WARPS,
    )  # fmt: skip
    of_taps = sums.sum((4, 5, 6))[:, :, :, None] if shared else sums.sum((4, 5)).mT
    return of_x, of_taps.to(kernel.dtype)


class _Tiles(NamedTuple):
    """How the work is cut: programs by sequences and heads, tokens, channels; and the size of a tile."""

    grid: tuple[int, int, int]
    tokens: int
    channels: int

    @classmethod
    def of(cls, x: StackedHeads) -> "_Tiles":
        replicas, groups, batch, heads, length, width = x.shape
        tokens = min(TOKENS, triton.next_power_of_2(length))
        channels = min(CHANNELS, triton.next_power_of_2(width))
        rows = replicas * groups * batch * heads
        return cls((rows, triton.cdiv(length, tokens), triton.cdiv(width, channels)), tokens, channels)


def _strides(kernel: StackedKernel) -> tuple[int, ...]:
    """None from channel to channel where they share their taps."""
    return *kernel.stride()[:3], kernel.stride(3) if kernel.shape[3] > 1 else 0, kernel.stride(4)


def _sum_in(x: Tensor) -> tl.dtype:
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def _count_in(*tensors: Tensor) -> tl.dtype:
    """What holds every address within a sequence: the wider numbers are slower."""
    furthest = max(t.shape[-2] * t.stride(-2) + t.shape[-1] * t.stride(-1) for t in tensors)
    return tl.int64 if furthest >= 1 << 31 else tl.int32


@triton.jit
def _filter(
    x, kernel, y, groups, batch, heads, length, width, dilation,
    x_r, x_g, x_b, x_h, x_l, x_c, t_r, t_g, t_h, t_c, t_w, y_r, y_g, y_b, y_h, y_l, y_c,
    W: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr, SUM: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    r, g = row // (groups * batch * heads), row // (batch * heads) % groups
    b, h = row // heads % batch, row % heads
    i = tl.program_id(1).to(COUNT) * TOKENS + tl.arange(0, TOKENS)
    c = tl.program_id(2).to(COUNT) * CHANNELS + tl.arange(0, CHANNELS)
    x += r * x_r + g * x_g + b * x_b + h * x_h
    kernel += r * t_r + g * t_g + h * t_h
    total = tl.zeros((TOKENS, CHANNELS), SUM)
    for j in tl.static_range(W):
        at = i - j * dilation
        seen = ((at >= 0) & (at < length))[:, None] & (c < width)[None, :]
        rows = tl.load(x + at[:, None] * x_l + c[None, :] * x_c, mask=seen, other=0).to(SUM)
        total += rows * tl.load(kernel + c * t_c + j * t_w, mask=c < width, other=0).to(SUM)[None, :]
    y += r * y_r + g * y_g + b * y_b + h * y_h
    there = (i < length)[:, None] & (c < width)[None, :]
    tl.store(y + i[:, None] * y_l + c[None, :] * y_c, total, mask=there)


@triton.jit
def _gradients(
    x, kernel, of_y, of_second, of_third, of_x, sums, groups, batch, heads, length, width, dilation,
    x_r, x_g, x_b, x_h, x_l, x_c, t_r, t_g, t_h, t_c, t_w, y_r, y_b, y_h, y_l, y_c,
    d_r, d_g, d_b, d_h, d_l, d_c, s_r, s_g, s_h, s_w, s_b, s_l,
    W: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr, SUM: tl.constexpr, SHARED: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    r, g = row // (groups * batch * heads), row // (batch * heads) % groups
    b, h = row // heads % batch, row % heads
    i = tl.program_id(1).to(COUNT) * TOKENS + tl.arange(0, TOKENS)
    c = tl.program_id(2).to(COUNT) * CHANNELS + tl.arange(0, CHANNELS)
    x += r * x_r + g * x_g + b * x_b + h * x_h
    if g == 1:
        of_y = of_second
    if g == 2:
        of_y = of_third
    of_y += r * y_r + b * y_b + h * y_h
    kernel += r * t_r + g * t_g + h * t_h
    sums += r * s_r + g * s_g + h * s_h + b * s_b + tl.program_id(1) * s_l
    there = (i < length)[:, None] & (c < width)[None, :]
    own = tl.load(of_y + i[:, None] * y_l + c[None, :] * y_c, mask=there, other=0).to(SUM)
    total = tl.zeros((TOKENS, CHANNELS), SUM)
    for j in tl.static_range(W):
        later, before = i + j * dilation, i - j * dilation
        reached = (later < length)[:, None] & (c < width)[None, :]
        rows = tl.load(of_y + later[:, None] * y_l + c[None, :] * y_c, mask=reached, other=0).to(SUM)
        total += rows * tl.load(kernel + c * t_c + j * t_w, mask=c < width, other=0).to(SUM)[None, :]
        seen = there & (before >= 0)[:, None]
        products = own * tl.load(x + before[:, None] * x_l + c[None, :] * x_c, mask=seen, other=0).to(SUM)
        if SHARED:
            tl.store(sums + j * s_w + tl.program_id(2), tl.sum(products))
        else:
            tl.store(sums + j * s_w + c, tl.sum(products, 0), mask=c < width)
    of_x += r * d_r + g * d_g + b * d_b + h * d_h
    tl.store(of_x + i[:, None] * d_l + c[None, :] * d_c, total, mask=there)
