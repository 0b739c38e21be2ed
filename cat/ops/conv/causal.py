"""Causal convolution: y_i = sum_{j < W} F_j x_{i - j dilation}, with zeros before the first token (arXiv 2407.05591, section 2).

    filter_heads     one kernel per head, shared by its channels: the convolution commutes with the projection of the head
    filter_channels  one kernel per channel: the depthwise convolution
    mix_heads        one kernel from each head to each head: the convolution of multi-head CAT

Each function chooses the fastest of three algorithms: direct.py, toeplitz.py or fft.py.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from cat.ops.common import autocast_to_compute_dtype
from cat.ops.conv import torch_backend
from cat.ops.conv.direct import DirectConvolution, backend_for, filter_direct, mix_direct, uses_numba
from cat.ops.conv.fft import filter_fft, mix_fft
from cat.ops.conv.toeplitz import filter_channels_toeplitz, filter_heads_toeplitz, mix_toeplitz, toeplitz
from cat.types import (
    ChannelKernel,
    GroupedHeads,
    GroupedKernel,
    HeadKernel,
    HeadMixingKernel,
    Heads,
    InputHeads,
    Positions,
    Queries,
)


class Limits(NamedTuple):
    """Limits by which an algorithm is chosen for kernel size W, sequence length L and `numel` values in x.

        direct    if W <= kernel_size and W <= ceil(L / dilation), unless L <= tokens and (W ratio > L or numel L < work)
        Toeplitz  otherwise, if L <= tokens
        FFT       otherwise

    If PyTorch compiles or exports, one graph serves all lengths: direct if W <= kernel_size, otherwise FFT.

    The algorithms agree up to rounding. Only the FFT is not exactly causal: rounding carries later tokens into earlier outputs.
    """

    kernel_size: int
    tokens: int
    ratio: int = 0
    work: int = 0


class Tuning(NamedTuple):
    """Limits for the PyTorch and the Numba backend of the direct algorithm, measured on one CPU thread with gradients."""

    torch: Limits
    numba: Limits

    def for_device(self, x: Tensor) -> Limits:
        if uses_numba(x):
            return self.numba
        # The Triton backend also takes short sequences, so no ratio.
        return self.torch if backend_for(x) is torch_backend else self.torch._replace(ratio=0)


MAX_MATRIX = 1024
"""Longest sequence for which `filter_heads_at` builds the Toeplitz matrix."""
HEAD_LIMITS = Tuning(Limits(12, 128, ratio=24), Limits(32, 128, work=12 << 20))
CHANNEL_LIMITS = Tuning(Limits(12, 96, ratio=2), Limits(32, 96))
MIXING_LIMITS = Limits(12, 96, ratio=16)


def filter_heads(x: Heads, kernel: HeadKernel, *, dilation: int = 1) -> Heads:
    """Convolve head h of `x` (B, H, L, C) along L with `kernel[h]`, (H, W). W >= 1 may exceed L."""
    limits = HEAD_LIMITS.for_device(x)
    return _convolve(x, kernel[:, None], dilation, limits, filter_direct, filter_heads_toeplitz, filter_fft)


def filter_heads_at(x: Heads, kernel: HeadKernel, positions: Positions, *, dilation: int = 1) -> Queries:
    """Compute `filter_heads` only at `positions`: these rows of the Toeplitz matrix times `x`."""
    length = x.shape[2]
    matrix = toeplitz(_within_length(kernel, length, dilation), length)
    rows = F.embedding(positions, matrix.transpose(0, 1).flatten(1)).unflatten(2, (len(kernel), length))
    return rows.transpose(1, 2) @ x


def is_sparse(x: Heads, positions: Positions) -> bool:
    """Whether `filter_heads_at` is faster than `filter_heads`: its matrix must be small compared with `x`."""
    return x.shape[2] <= MAX_MATRIX and 2 * positions.shape[1] <= x.shape[2]


def filter_channels(x: Heads, kernel: ChannelKernel, *, dilation: int = 1) -> Heads:
    """Convolve channel c of head h of `x` (B, H, L, C) along L with `kernel[h, c]`."""
    # The Numba backend is faster than one small matrix product per channel, for every kernel size.
    by_toeplitz = functools.partial(filter_direct, dilation=1) if uses_numba(x) else filter_channels_toeplitz
    return _convolve(x, kernel, dilation, CHANNEL_LIMITS.for_device(x), filter_direct, by_toeplitz, filter_fft)


def filter_groups(x: GroupedHeads, kernel: GroupedKernel, *, dilation: int = 1) -> tuple[Heads, ...]:
    """Apply `filter_heads` or `filter_channels` to each of up to three groups in one call. It is faster if `is_short`."""
    return tuple(
        y.squeeze(0)
        for y in DirectConvolution.call(autocast_to_compute_dtype(x)[None], autocast_to_compute_dtype(kernel)[None], dilation)
    )


def is_short(x: Float[Tensor, "B L _"], kernel: Tensor, channels: int, *, dilation: int = 1) -> bool:
    """Whether a kernel (H, W) or (H, C, W) is short enough for the direct algorithm.

    `x` gives the number of tokens and the device. `channels` is the number of channels of all heads.
    """
    numel = x.shape[0] * x.shape[1] * channels
    return _is_direct(kernel, x.shape[1], numel, dilation, (HEAD_LIMITS if kernel.dim() == 2 else CHANNEL_LIMITS).for_device(x))


def mix_heads(x: InputHeads, kernel: HeadMixingKernel, *, dilation: int = 1) -> Heads:
    """Sum the heads g of `x` (B, G, L, C), each convolved with `kernel[h, g]`, to output head h."""
    return _convolve(x, kernel, dilation, MIXING_LIMITS, mix_direct, mix_toeplitz, mix_fft)


def dilate(kernel: Tensor, dilation: int) -> Tensor:
    """Write out a dilated kernel: insert `dilation` - 1 zeros between its values."""
    if dilation == 1:
        return kernel
    return F.pad(kernel[..., None], (0, dilation - 1)).flatten(-2)[..., : 1 - dilation]


def _convolve(
    x: InputHeads,
    kernel: Tensor,
    dilation: int,
    limits: Limits,
    direct: Callable[[InputHeads, Tensor, int], Heads],
    by_toeplitz: Callable[[InputHeads, Tensor], Heads],
    by_fft: Callable[[InputHeads, Tensor], Heads],
) -> Heads:
    x, kernel, length = autocast_to_compute_dtype(x), autocast_to_compute_dtype(kernel), x.shape[2]
    if _is_direct(kernel, length, x.numel(), dilation, limits):
        return direct(x, kernel, dilation)
    kernel = _within_length(kernel, length, dilation)
    return by_fft(x, kernel) if torch.compiler.is_compiling() or length > limits.tokens else by_toeplitz(x, kernel)


def _within_length(kernel: Tensor, length: int, dilation: int) -> Tensor:
    """Write out a dilated kernel without the values that reach before the first token."""
    if torch.compiler.is_compiling():  # exactly `length` values: no case for a shorter kernel
        return F.pad(dilate(kernel, dilation), (0, length))[..., :length]
    return dilate(kernel[..., : -(-length // dilation)], dilation)


def _is_direct(kernel: Tensor, length: int, numel: int, dilation: int, limits: Limits) -> bool:
    """Whether `limits` choose the direct algorithm."""
    width = kernel.shape[-1]
    if torch.compiler.is_compiling():
        # Imported only here: it takes half a second, and the compiler has imported it.
        from torch.fx.experimental.symbolic_shapes import statically_known_true

        return statically_known_true(width <= limits.kernel_size)
    is_small = length <= limits.tokens and (width * limits.ratio > length or numel * length < limits.work)
    return width <= min(limits.kernel_size, -(-length // dilation)) and not is_small
