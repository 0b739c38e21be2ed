"""Direct causal convolution for a GPU in Triton, one pass over the sequence: y_i = sum_{j < W} F_j x_{i - j dilation}.

PyTorch takes one pass per kernel value. Every group of every ensemble member has its own kernel: x is (R, G, B, H, L, C), the
kernel (R, G, H, 1 or C, W). A view, such as a slice of a projection, is read without a copy, and the output keeps its memory
order. Sums are in float32, or in float64 for float64 values.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from cat.types import MemberHeads, StackedHeads, StackedKernel

TILE_TOKENS, TILE_CHANNELS, WARPS = 32, 32, 1
"""Largest tile that a program computes, and the number of warps that compute it."""


def filter_stacks(x: StackedHeads, kernel: StackedKernel, dilation: int) -> StackedHeads:
    """Convolve every group of every ensemble member with its own kernel."""
    tiles = _Tiles.of(x)
    y = torch.empty_like(x, dtype=torch.promote_types(x.dtype, kernel.dtype))
    _filter[tiles.grid](
        x, kernel, y, *x.shape[1:], dilation, *x.stride(), *_strides(kernel), *y.stride(),
        kernel.shape[4], tiles.tokens, tiles.channels, _sum_type(y), _index_type(x, y), num_warps=WARPS,
    )  # fmt: skip
    return y


def filter_gradients(
    x: StackedHeads, kernel: StackedKernel, gradients: Sequence[MemberHeads], dilation: int
) -> tuple[StackedHeads, StackedKernel]:
    """Return the gradients of x and of the kernel, given the gradient of each group's output, for up to three groups.

    They are reproducible to the bit, because every tile has its own sums.
    """
    assert len(gradients) <= 3, "the Triton kernel has pointers for three groups"
    if len({gradient.stride() for gradient in gradients}) > 1:
        gradients = torch.stack(list(gradients)).unbind()
    first, second, third = (*gradients, gradients[0], gradients[0])[:3]
    tiles = _Tiles.of(x)
    shared = kernel.shape[3] == 1
    grad_x = torch.empty_like(x)
    channel_sums = tiles.grid[2] if shared else x.shape[5]
    sum_dtype = torch.promote_types(kernel.dtype, torch.float32)
    members, groups, batch, heads = x.shape[:4]
    sums = kernel.new_empty(members, groups, heads, kernel.shape[4], batch, tiles.grid[1], channel_sums, dtype=sum_dtype)
    _gradients[tiles.grid](
        x, kernel, first, second, third, grad_x, sums, *x.shape[1:], dilation, *x.stride(), *_strides(kernel), *first.stride(),
        *grad_x.stride(), *sums.stride()[:-1],
        kernel.shape[4], tiles.tokens, tiles.channels, _sum_type(first), shared, _index_type(x, first, grad_x), num_warps=WARPS,
    )  # fmt: skip
    grad_kernel = sums.sum((4, 5, 6))[:, :, :, None] if shared else sums.sum((4, 5)).mT
    return grad_x, grad_kernel.to(kernel.dtype)


class _Tiles(NamedTuple):
    """Division of the work into tiles."""

    grid: tuple[int, int, int]
    """Programs per axis: heads of all sequences, token tiles, channel tiles."""
    tokens: int
    channels: int

    @classmethod
    def of(cls, x: StackedHeads) -> "_Tiles":
        members, groups, batch, heads, length, width = x.shape
        tokens = min(TILE_TOKENS, triton.next_power_of_2(length))
        channels = min(TILE_CHANNELS, triton.next_power_of_2(width))
        programs = members * groups * batch * heads
        return cls((programs, triton.cdiv(length, tokens), triton.cdiv(width, channels)), tokens, channels)


def _strides(kernel: StackedKernel) -> tuple[int, ...]:
    """Return the strides of the kernel; that of the channels is 0 if the channels of a head share a kernel."""
    return *kernel.stride()[:3], kernel.stride(3) if kernel.shape[3] > 1 else 0, kernel.stride(4)


def _sum_type(x: Tensor) -> tl.dtype:
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def _index_type(*tensors: Tensor) -> tl.dtype:
    """Return the narrowest integer type that holds every offset within a sequence: int64 is slower."""
    max_offset = max(t.shape[-2] * t.stride(-2) + t.shape[-1] * t.stride(-1) for t in tensors)
    return tl.int64 if max_offset >= 1 << 31 else tl.int32


@triton.jit
def _filter(
    x, kernel, y, groups, batch, heads, length, width, dilation,
    x_r, x_g, x_b, x_h, x_l, x_c, k_r, k_g, k_h, k_c, k_w, y_r, y_g, y_b, y_h, y_l, y_c,
    W: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr, SUM: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    r, g = program // (groups * batch * heads), program // (batch * heads) % groups
    b, h = program // heads % batch, program % heads
    i = tl.program_id(1).to(INDEX) * TOKENS + tl.arange(0, TOKENS)
    c = tl.program_id(2).to(INDEX) * CHANNELS + tl.arange(0, CHANNELS)
    x += r * x_r + g * x_g + b * x_b + h * x_h
    kernel += r * k_r + g * k_g + h * k_h
    total = tl.zeros((TOKENS, CHANNELS), SUM)
    for j in tl.static_range(W):
        source = i - j * dilation
        source_valid = ((source >= 0) & (source < length))[:, None] & (c < width)[None, :]
        values = tl.load(x + source[:, None] * x_l + c[None, :] * x_c, mask=source_valid, other=0).to(SUM)
        total += values * tl.load(kernel + c * k_c + j * k_w, mask=c < width, other=0).to(SUM)[None, :]
    y += r * y_r + g * y_g + b * y_b + h * y_h
    valid = (i < length)[:, None] & (c < width)[None, :]
    tl.store(y + i[:, None] * y_l + c[None, :] * y_c, total, mask=valid)


@triton.jit
def _gradients(
    x, kernel, grad_y, grad_second, grad_third, grad_x, sums, groups, batch, heads, length, width, dilation,
    x_r, x_g, x_b, x_h, x_l, x_c, k_r, k_g, k_h, k_c, k_w, y_r, y_b, y_h, y_l, y_c,
    d_r, d_g, d_b, d_h, d_l, d_c, s_r, s_g, s_h, s_w, s_b, s_l,
    W: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr, SUM: tl.constexpr, SHARED: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    r, g = program // (groups * batch * heads), program // (batch * heads) % groups
    b, h = program // heads % batch, program % heads
    i = tl.program_id(1).to(INDEX) * TOKENS + tl.arange(0, TOKENS)
    c = tl.program_id(2).to(INDEX) * CHANNELS + tl.arange(0, CHANNELS)
    x += r * x_r + g * x_g + b * x_b + h * x_h
    if g == 1:
        grad_y = grad_second
    if g == 2:
        grad_y = grad_third
    grad_y += r * y_r + b * y_b + h * y_h
    kernel += r * k_r + g * k_g + h * k_h
    sums += r * s_r + g * s_g + h * s_h + b * s_b + tl.program_id(1) * s_l
    valid = (i < length)[:, None] & (c < width)[None, :]
    gradient = tl.load(grad_y + i[:, None] * y_l + c[None, :] * y_c, mask=valid, other=0).to(SUM)
    total = tl.zeros((TOKENS, CHANNELS), SUM)
    for j in tl.static_range(W):
        later, before = i + j * dilation, i - j * dilation
        later_valid = (later < length)[:, None] & (c < width)[None, :]
        values = tl.load(grad_y + later[:, None] * y_l + c[None, :] * y_c, mask=later_valid, other=0).to(SUM)
        total += values * tl.load(kernel + c * k_c + j * k_w, mask=c < width, other=0).to(SUM)[None, :]
        source_valid = valid & (before >= 0)[:, None]
        products = gradient * tl.load(x + before[:, None] * x_l + c[None, :] * x_c, mask=source_valid, other=0).to(SUM)
        if SHARED:
            tl.store(sums + j * s_w + tl.program_id(2), tl.sum(products))
        else:
            tl.store(sums + j * s_w + c, tl.sum(products, 0), mask=c < width)
    grad_x += r * d_r + g * d_g + b * d_b + h * d_h
    tl.store(grad_x + i[:, None] * d_l + c[None, :] * d_c, total, mask=valid)
