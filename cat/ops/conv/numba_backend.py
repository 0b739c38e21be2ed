"""Compiled loops for a CPU: what triton_backend.py computes on a GPU, of the same tensors, in one pass over the sequence.

The numbers of all groups, heads and channels of a token lie side by side: a loop over them is one of the processor's vectors.
Numba compiles the loops when they are first called, and keeps what it made beside this file.
"""

import functools
import itertools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from cat.types import Replicated, StackedHeads, StackedKernel

TOKENS = 512
"""Of a part, which one thread computes: of one sequence, or of several that are shorter."""
SOME = 8
"""Tokens whose numbers stay in the fastest cache."""

Rows = Float[Tensor, "R B L N"]
"""The N = G H C numbers of each token."""


def filter_stacks(x: StackedHeads, kernel: StackedKernel, dilation: int) -> StackedHeads:
    """y_i = sum_{j < W} taps_j x_{i - j dilation}, with zeros before the first token."""
    kind = torch.promote_types(x.dtype, kernel.dtype)
    rows = _rows(x, _wide(kind))
    y = torch.empty(rows.shape, dtype=rows.dtype)
    _in_threads(
        _filter, _Parts.of(rows), _flat(rows), rows.stride(), _numbers(kernel, rows.dtype), dilation, x.shape[5], y.numpy()
    )
    return _heads(y.to(kind), x)


def filter_gradients(
    x: StackedHeads, kernel: StackedKernel, gradients: Sequence[Replicated], dilation: int
) -> tuple[StackedHeads, StackedKernel]:
    """Those of x and of the taps, given one of the outcome of each group; the same bits on every number of threads."""
    kind = _wide(torch.promote_types(gradients[0].dtype, kernel.dtype))
    rows = _rows(x, kind)
    of_y = [gradient.to(kind) if gradient.stride(-1) == 1 else gradient.to(kind).contiguous() for gradient in gradients]
    of_x, of_taps, parts = torch.empty(rows.shape, dtype=kind), torch.empty(kernel.shape, dtype=kind), _Parts.of(rows)
    sums = np.empty((parts.in_all, kernel.shape[4], rows.shape[3]), of_x.numpy().dtype)
    _in_threads(
        _gradients, parts, _flat(rows), rows.stride(), _numbers(kernel, kind), dilation, x.shape[5], tuple(map(_flat, of_y)),
        tuple(gradient.stride()[:-1] for gradient in of_y), of_x.numpy(), sums,
    )  # fmt: skip
    _add(sums, of_taps.numpy())
    return _heads(of_x.to(x.dtype), x), of_taps.to(kernel.dtype)


class _Parts(NamedTuple):
    """How the work is cut, whatever the number of threads."""

    sequences: int
    """Of a part, at most."""
    tokens: int
    """Of each of them, at most."""
    of_replica: int
    in_all: int

    @classmethod
    def of(cls, rows: Rows) -> "_Parts":
        replicas, batch, length, _ = rows.shape
        tokens = max(1, min(length, TOKENS))
        sequences = TOKENS // tokens
        of_replica = -(-batch // sequences) * -(-length // tokens)
        return cls(sequences, tokens, of_replica, replicas * of_replica)


def _wide(kind: torch.dtype) -> torch.dtype:
    """NumPy has no bfloat16; and sums of it would be coarse."""
    return torch.promote_types(kind, torch.float32)


def _rows(x: StackedHeads, kind: torch.dtype) -> Rows:
    """A view where the numbers of a token lie side by side."""
    rows = x.to(kind).permute(0, 2, 4, 1, 3, 5).flatten(3)
    return rows if rows.stride(3) == 1 else rows.contiguous()


def _heads(rows: Rows, x: StackedHeads) -> StackedHeads:
    return rows.unflatten(3, (x.shape[1], x.shape[3], x.shape[5])).permute(0, 3, 1, 4, 2, 5)


def _numbers(kernel: StackedKernel, kind: torch.dtype) -> np.ndarray:
    return kernel.detach().to(kind).contiguous().numpy()


def _flat(x: Tensor) -> np.ndarray:
    """The memory from the first number of `x` to its last: loops find their way by the strides."""
    size = 1 + sum((length - 1) * stride for length, stride in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
    return x.as_strided((size,), (1,)).numpy()


def _in_threads(loop: Callable[..., None], parts: _Parts, *args: Any) -> None:
    """Does all parts, on as many threads as PyTorch takes."""
    threads = min(torch.get_num_threads(), parts.in_all)
    if threads <= 1:
        return loop(0, parts.in_all, parts[:3], *args)
    bounds = [parts.in_all * thread // threads for thread in range(threads + 1)]
    others = (itertools.repeat(arg) for arg in (parts[:3], *args))
    list(_pool(threads, os.getpid()).map(loop, bounds, bounds[1:], *others))
    return None


@functools.cache
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """A forked process has none of its parent's threads."""
    return ThreadPoolExecutor(threads, thread_name_prefix="filter")


def compiled(loop: Callable[..., Any]) -> Callable[..., Any]:
    """The loop, compiled when it is called: for its types once, and once in every process if there is no place to keep it.

    No `fastmath`, so that a number is the same on every kind of CPU: vectors are of channels, sums of one go on in their order.
    """
    compiler = functools.partial(numba.njit, nogil=True, error_model="numpy")
    try:
        return compiler(cache=True)(loop)
    except RuntimeError:  # neither beside this file nor in the user's home may anything be written
        return compiler()(loop)


@compiled
def _bounds(part, parts, batch, length):
    """The replica of the part, and its sequences and tokens."""
    sequences, tokens, of_replica = parts
    replica, own = divmod(part, of_replica)
    first, start = own // -(-length // tokens) * sequences, own % -(-length // tokens) * tokens
    return replica, first, min(first + sequences, batch), start, min(start + tokens, length)


@compiled
def _spread(kernel, channels, own):
    """By tap what it multiplies each number of a token by."""
    _, heads, _, width = kernel.shape
    for n in range(own.shape[1]):
        g, h, c = n // (heads * channels), n // channels % heads, n % channels
        for j in range(width):
            own[j, n] = kernel[g, h, min(c, kernel.shape[2] - 1), j]


@compiled
def _filter(begin, end, parts, x, strides, kernel, dilation, channels, y):
    _, batch, length, width = y.shape
    x_r, x_b, x_l, _ = strides
    reach, spread = kernel.shape[4], -1
    weights = np.empty((reach, width), kernel.dtype)
    for part in range(begin, end):
        r, first, last, start, stop = _bounds(part, parts, batch, length)
        if r != spread:
            _spread(kernel[r], channels, weights)
            spread = r
        for b in range(first, last):
            for i in range(start, stop):
                out, at = y[r, b, i], r * x_r + b * x_b + i * x_l
                own, row = weights[0], x[at : at + width]
                for n in range(width):
                    out[n] = own[n] * row[n]
                for j in range(1, min(reach, i // dilation + 1)):
                    before = at - j * dilation * x_l
                    own, row = weights[j], x[before : before + width]
                    for n in range(width):
                        out[n] += own[n] * row[n]


@compiled
def _gradients(begin, end, parts, x, strides, kernel, dilation, channels, of_y, strides_of_y, of_x, sums):
    _, batch, length, width = of_x.shape
    x_r, x_b, x_l, _ = strides
    reach, spread = kernel.shape[4], -1
    weights = np.empty((reach, width), kernel.dtype)
    span = (reach - 1) * dilation
    some = max(SOME, span)
    later = np.empty((min(some + span, length), width), kernel.dtype)
    for part in range(begin, end):
        r, first, last, start, stop = _bounds(part, parts, batch, length)
        if r != spread:
            _spread(kernel[r], channels, weights)
            spread = r
        sums[part] = 0
        for b in range(first, last):
            for low in range(start, stop, some):
                high = min(low + some, stop)
                # Of these tokens, and of the later ones that read them.
                _gather(of_y, strides_of_y, kernel.shape[2], channels, r, b, low, min(high + span, length), later)
                for i in range(low, high):
                    out, own, row = of_x[r, b, i], weights[0], later[i - low]
                    for n in range(width):
                        out[n] = own[n] * row[n]
                    for j in range(1, min(reach, (length - 1 - i) // dilation + 1)):
                        own, row = weights[j], later[i - low + j * dilation]
                        for n in range(width):
                            out[n] += own[n] * row[n]
                for j in range(reach):
                    total, end = sums[part, j], min(high, length - j * dilation)
                    for i in range(low, end - 1, 2):  # two tokens each time that the sums are read and written
                        at, to = r * x_r + b * x_b + i * x_l, i - low + j * dilation
                        own, row = x[at : at + width], later[to]
                        next_own, next_row = x[at + x_l : at + x_l + width], later[to + 1]
                        for n in range(width):
                            total[n] += own[n] * row[n] + next_own[n] * next_row[n]
                    if end > low and (end - low) % 2:
                        at = r * x_r + b * x_b + (end - 1) * x_l
                        own, row = x[at : at + width], later[end - 1 - low + j * dilation]
                        for n in range(width):
                            total[n] += own[n] * row[n]


@compiled
def _gather(of_y, strides, heads, channels, r, b, start, stop, later):
    """Lays the gradients of all groups side by side."""
    for g in range(len(of_y)):
        flat, (s_r, s_b, s_h, s_l) = of_y[g], strides[g]
        together = heads if s_h == channels else 1
        for h in range(0, heads, together):
            first, size = (g * heads + h) * channels, together * channels
            for i in range(start, stop):
                at = r * s_r + b * s_b + h * s_h + i * s_l
                out, row = later[i - start, first : first + size], flat[at : at + size]
                for n in range(size):
                    out[n] = row[n]


@compiled
def _add(sums, of_taps):
    """The sums of all parts of a replica, and of all channels that share their taps."""
    replicas, groups, heads, own, width = of_taps.shape
    channels, of_replica = sums.shape[2] // max(1, groups * heads), len(sums) // max(1, replicas)
    of_taps[:] = 0
    total = np.empty(sums.shape[1:], sums.dtype)
    for r in range(replicas):
        total[:] = 0
        for part in range(r * of_replica, (r + 1) * of_replica):
            total += sums[part]
        for n in range(total.shape[1]):
            g, h, c = n // (heads * channels), n // channels % heads, n % channels
            for j in range(width):
                of_taps[r, g, h, min(c, own - 1), j] += total[j, n]
