"""Direct causal convolution for a CPU in compiled loops, one pass over the sequence: y_i = sum_{j < W} F_j x_{i - j dilation}.

It computes the same as triton_backend.py does on a GPU. The N values of a token (all groups, heads and channels) are adjacent in
memory, so the innermost loop runs over them and uses the vector instructions of the CPU. Numba compiles the loops at their first
call and caches the machine code beside this file.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from cat.ops.numba_loops import compiled, memory, run_loop
from cat.types import MemberHeads, StackedHeads, StackedKernel

CHUNK_TOKENS = 512
"""Tokens per chunk, which one thread computes: a part of one sequence, or several shorter sequences."""
TILE_TOKENS = 8
"""Tokens per tile, whose values stay in the fastest cache."""

TokenVectors = Float[Tensor, "R B L N"]
"""The N = G H C values of each token."""


def filter_stacks(x: StackedHeads, kernel: StackedKernel, dilation: int) -> StackedHeads:
    """Convolve every group of every ensemble member with its own kernel."""
    dtype = torch.promote_types(x.dtype, kernel.dtype)
    vectors = _to_token_vectors(x, _loop_dtype(dtype))
    y = torch.empty(vectors.shape, dtype=vectors.dtype)
    chunks = _Chunks.of(vectors)
    run_loop(
        _filter, chunks.total, chunks[:3], memory(vectors), vectors.stride(), _kernel_array(kernel, vectors.dtype), dilation,
        x.shape[5], y.numpy(),
    )  # fmt: skip
    return _to_heads(y.to(dtype), x)


def filter_gradients(
    x: StackedHeads, kernel: StackedKernel, gradients: Sequence[MemberHeads], dilation: int
) -> tuple[StackedHeads, StackedKernel]:
    """Return the gradients of x and of the kernel, given the gradient of each group's output.

    The result does not depend on the number of threads, to the bit.
    """
    dtype = _loop_dtype(torch.promote_types(gradients[0].dtype, kernel.dtype))
    vectors = _to_token_vectors(x, dtype)
    grad_y = [gradient.to(dtype) if gradient.stride(-1) == 1 else gradient.to(dtype).contiguous() for gradient in gradients]
    grad_x, grad_kernel = torch.empty(vectors.shape, dtype=dtype), torch.empty(kernel.shape, dtype=dtype)
    chunks = _Chunks.of(vectors)
    sums = np.empty((chunks.total, kernel.shape[4], vectors.shape[3]), grad_x.numpy().dtype)
    run_loop(
        _gradients, chunks.total, chunks[:3], memory(vectors), vectors.stride(), _kernel_array(kernel, dtype), dilation,
        x.shape[5], tuple(map(memory, grad_y)), tuple(gradient.stride()[:-1] for gradient in grad_y), grad_x.numpy(), sums,
    )  # fmt: skip
    _reduce_kernel_gradients(sums, grad_kernel.numpy())
    return _to_heads(grad_x.to(x.dtype), x), grad_kernel.to(kernel.dtype)


class _Chunks(NamedTuple):
    """Division of the work into chunks. It does not depend on the number of threads."""

    sequences: int
    """Most sequences per chunk."""
    tokens: int
    """Most tokens per sequence of a chunk."""
    per_member: int
    total: int

    @classmethod
    def of(cls, vectors: TokenVectors) -> "_Chunks":
        members, batch, length, _ = vectors.shape
        tokens = max(1, min(length, CHUNK_TOKENS))
        sequences = CHUNK_TOKENS // tokens
        per_member = -(-batch // sequences) * -(-length // tokens)
        return cls(sequences, tokens, per_member, members * per_member)


def _loop_dtype(dtype: torch.dtype) -> torch.dtype:
    """NumPy has no bfloat16, and sums in it would be inexact."""
    return torch.promote_types(dtype, torch.float32)


def _to_token_vectors(x: StackedHeads, dtype: torch.dtype) -> TokenVectors:
    """Return a view, if possible, in which the values of a token are adjacent in memory."""
    vectors = x.to(dtype).permute(0, 2, 4, 1, 3, 5).flatten(3)
    return vectors if vectors.stride(3) == 1 else vectors.contiguous()


def _to_heads(vectors: TokenVectors, x: StackedHeads) -> StackedHeads:
    return vectors.unflatten(3, (x.shape[1], x.shape[3], x.shape[5])).permute(0, 3, 1, 4, 2, 5)


def _kernel_array(kernel: StackedKernel, dtype: torch.dtype) -> np.ndarray:
    # A copy, because the memory of a tensor that NumPy has seen cannot be freed, as sharding does with gathered parameters.
    return kernel.detach().to(dtype).clone(memory_format=torch.contiguous_format).numpy()


@compiled
def _chunk_bounds(chunk, chunks, batch, length):
    """Return the ensemble member of a chunk, and the ranges of its sequences and tokens."""
    sequences, tokens, per_member = chunks
    member, index = divmod(chunk, per_member)
    first, start = index // -(-length // tokens) * sequences, index % -(-length // tokens) * tokens
    return member, first, min(first + sequences, batch), start, min(start + tokens, length)


@compiled
def _expand_kernel(kernel, channels, weights):
    """Fill `weights` (W, N) with the kernel value for each value of a token."""
    _, heads, _, width = kernel.shape
    for n in range(weights.shape[1]):
        g, h, c = n // (heads * channels), n // channels % heads, n % channels
        for j in range(width):
            weights[j, n] = kernel[g, h, min(c, kernel.shape[2] - 1), j]


@compiled
def _filter(begin, end, chunks, x, strides, kernel, dilation, channels, y):
    _, batch, length, size = y.shape
    x_r, x_b, x_l, _ = strides
    width, expanded = kernel.shape[4], -1
    weights = np.empty((width, size), kernel.dtype)
    for chunk in range(begin, end):
        r, first, last, start, stop = _chunk_bounds(chunk, chunks, batch, length)
        if r != expanded:
            _expand_kernel(kernel[r], channels, weights)
            expanded = r
        for b in range(first, last):
            for i in range(start, stop):
                out, offset = y[r, b, i], r * x_r + b * x_b + i * x_l
                weight, token = weights[0], x[offset : offset + size]
                for n in range(size):
                    out[n] = weight[n] * token[n]
                for j in range(1, min(width, i // dilation + 1)):
                    before = offset - j * dilation * x_l
                    weight, token = weights[j], x[before : before + size]
                    for n in range(size):
                        out[n] += weight[n] * token[n]


@compiled
def _gradients(begin, end, chunks, x, strides, kernel, dilation, channels, grad_y, grad_y_strides, grad_x, sums):
    _, batch, length, size = grad_x.shape
    x_r, x_b, x_l, _ = strides
    width, expanded = kernel.shape[4], -1
    weights = np.empty((width, size), kernel.dtype)
    span = (width - 1) * dilation
    tile = max(TILE_TOKENS, span)
    later = np.empty((min(tile + span, length), size), kernel.dtype)
    for chunk in range(begin, end):
        r, first, last, start, stop = _chunk_bounds(chunk, chunks, batch, length)
        if r != expanded:
            _expand_kernel(kernel[r], channels, weights)
            expanded = r
        sums[chunk] = 0
        for b in range(first, last):
            for low in range(start, stop, tile):
                high = min(low + tile, stop)
                # Output gradients of this tile, and of the later tokens whose outputs depend on it.
                _gather_gradients(grad_y, grad_y_strides, kernel.shape[2], channels, r, b, low, min(high + span, length), later)
                for i in range(low, high):
                    out, weight, gradient = grad_x[r, b, i], weights[0], later[i - low]
                    for n in range(size):
                        out[n] = weight[n] * gradient[n]
                    for j in range(1, min(width, (length - 1 - i) // dilation + 1)):
                        weight, gradient = weights[j], later[i - low + j * dilation]
                        for n in range(size):
                            out[n] += weight[n] * gradient[n]
                for j in range(width):
                    total, limit = sums[chunk, j], min(high, length - j * dilation)
                    for i in range(low, limit - 1, 2):  # two tokens each time that the sums are loaded and stored
                        offset, place = r * x_r + b * x_b + i * x_l, i - low + j * dilation
                        token, gradient = x[offset : offset + size], later[place]
                        next_token, next_gradient = x[offset + x_l : offset + x_l + size], later[place + 1]
                        for n in range(size):
                            total[n] += token[n] * gradient[n] + next_token[n] * next_gradient[n]
                    if limit > low and (limit - low) % 2:
                        offset = r * x_r + b * x_b + (limit - 1) * x_l
                        token, gradient = x[offset : offset + size], later[limit - 1 - low + j * dilation]
                        for n in range(size):
                            total[n] += token[n] * gradient[n]


@compiled
def _gather_gradients(grad_y, strides, heads, channels, r, b, start, stop, later):
    """Fill `later` with the output gradients of tokens `start` to `stop`, those of all groups adjacent."""
    for g in range(len(grad_y)):
        memory, (s_r, s_b, s_h, s_l) = grad_y[g], strides[g]
        adjacent = heads if s_h == channels else 1  # heads that can be copied at once
        for h in range(0, heads, adjacent):
            first, size = (g * heads + h) * channels, adjacent * channels
            for i in range(start, stop):
                offset = r * s_r + b * s_b + h * s_h + i * s_l
                out, values = later[i - start, first : first + size], memory[offset : offset + size]
                for n in range(size):
                    out[n] = values[n]


@compiled
def _reduce_kernel_gradients(sums, grad_kernel):
    """Sum over the chunks of each ensemble member, and over the channels that share a kernel."""
    members, groups, heads, kernels, width = grad_kernel.shape
    channels, per_member = sums.shape[2] // max(1, groups * heads), len(sums) // max(1, members)
    grad_kernel[:] = 0
    total = np.empty(sums.shape[1:], sums.dtype)
    for r in range(members):
        total[:] = 0
        for chunk in range(r * per_member, (r + 1) * per_member):
            total += sums[chunk]
        for n in range(total.shape[1]):
            g, h, c = n // (heads * channels), n // channels % heads, n % channels
            for j in range(width):
                grad_kernel[r, g, h, min(c, kernels - 1), j] += total[j, n]
