"""Compiled loops for a CPU: compilation with Numba, memory of tensors, and the division of work among threads."""

import functools
import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
import torch
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

LANES = 16
"""Parts of a sum: the number of float32 in the largest vector register."""


def compiled(loop: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a loop at its first call with each set of argument types.

    Without a writable place for the cache, every process compiles it again. `fastmath` is off, so that results are equal to the
    bit on every kind of CPU: vector instructions run over channels, and each sum keeps its order.
    """
    compiler = functools.partial(numba.njit, nogil=True, error_model="numpy")
    try:
        return compiler(cache=True)(loop)
    except RuntimeError:  # neither the folder of this file nor the user's home is writable
        return compiler()(loop)


def run_loop(loop: Callable[..., None], total: int, *args: Any) -> None:
    """Call `loop(begin, end, *args)` for all of range(total), on as many threads as PyTorch uses.

    No two elements may write to the same memory: then the result does not depend on the number of threads.
    """
    threads = min(torch.get_num_threads(), total)
    if threads <= 1:
        return loop(0, total, *args)
    bounds = [total * thread // threads for thread in range(threads + 1)]
    list(_pool(threads, os.getpid()).map(loop, bounds, bounds[1:], *map(itertools.repeat, args)))
    return None


def memory(x: Tensor) -> np.ndarray:
    """Return the memory from the first to the last value of `x` as one axis. The loops index it by the strides."""
    size = 1 + sum((length - 1) * stride for length, stride in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
    return x.as_strided((size,), (1,)).numpy()


@functools.cache
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Return the threads of a process. A forked process does not inherit the threads of its parent, hence `process`."""
    return ThreadPoolExecutor(threads, thread_name_prefix="loop")


def vectors(context, builder, kinds, arrays):
    """Return the type of a vector, the memory of each array as such vectors, and the alignment of an array."""
    from llvmlite import ir  # a part of Numba

    scalar = context.get_value_type(kinds[0].dtype)
    vector, align = ir.VectorType(scalar, LANES), context.get_abi_sizeof(scalar)
    data = (context.make_array(kind)(context, builder, array).data for kind, array in zip(kinds, arrays, strict=True))
    return vector, [builder.bitcast(start, vector.as_pointer()) for start in data], align


def zero_of(vector):
    from llvmlite import ir

    return ir.Constant(vector.element, 0.0)


def repeated(builder, vector, value):
    """Return a vector of equal values."""
    from llvmlite import ir

    index = ir.IntType(32)
    single = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(index, 0))
    return builder.shuffle_vector(single, single, ir.Constant(ir.VectorType(index, LANES), [0] * LANES))


def sum_lanes(builder, total):
    """Add the second half of a vector to the first until one value is left."""
    from llvmlite import ir

    index, lanes = ir.IntType(32), LANES
    while lanes > 1:
        lanes //= 2
        halves = (
            builder.shuffle_vector(total, total, ir.Constant(ir.VectorType(index, lanes), list(half)))
            for half in (range(lanes), range(lanes, 2 * lanes))
        )
        total = builder.fadd(*halves)
    return builder.extract_element(total, ir.Constant(index, 0))


@intrinsic
def _dot_blocks(context, x, y, blocks):
    """Return the sum of the products of the first `blocks` times LANES values."""

    def code(context, builder, signature, arguments):
        vector, starts, align = vectors(context, builder, signature.args[:2], arguments[:2])
        sums = cgutils.alloca_once_value(builder, repeated(builder, vector, zero_of(vector)))
        with cgutils.for_range(builder, arguments[2]) as loop:
            first, second = (builder.load(builder.gep(start, [loop.index]), align=align) for start in starts)
            builder.store(builder.fadd(builder.load(sums), builder.fmul(first, second)), sums)
        return sum_lanes(builder, builder.load(sums))

    return x.dtype(x, y, types.intp), code


@intrinsic
def update_rows(context, first, second, factors, x, a, b, y, blocks):
    """Set first = factors * first + a x and second = factors * second + b x; return <first, y> and <second, y>.

    All have `blocks` times LANES values. Vector instructions without the checks that arrays do not overlap, which would take
    longer than a short row.
    """

    def code(context, builder, signature, arguments):
        kinds, values = signature.args, arguments
        arrays = [0, 1, 2, 3, 6]
        vector, starts, align = vectors(context, builder, [kinds[n] for n in arrays], [values[n] for n in arrays])
        scales = [repeated(builder, vector, values[n]) for n in (4, 5)]
        zero = repeated(builder, vector, zero_of(vector))
        sums = [cgutils.alloca_once_value(builder, zero) for _ in scales]
        with cgutils.for_range(builder, values[7]) as loop:
            places = [builder.gep(start, [loop.index]) for start in starts]
            factor, added, other = (builder.load(place, align=align) for place in places[2:])
            for place, scale, total in zip(places[:2], scales, sums, strict=True):
                row = builder.fmul(factor, builder.load(place, align=align))
                row = builder.fadd(row, builder.fmul(added, scale))
                builder.store(row, place, align=align)
                builder.store(builder.fadd(builder.load(total), builder.fmul(row, other)), total)
        return context.make_tuple(builder, signature.return_type, [sum_lanes(builder, builder.load(total)) for total in sums])

    dtype = first.dtype
    return types.UniTuple(dtype, 2)(first, second, factors, x, dtype, dtype, y, types.intp), code


@intrinsic
def add_rows(context, out, first, second, a, b, blocks):
    """Add a first + b second to `out`. All have `blocks` times LANES values."""

    def code(context, builder, signature, arguments):
        vector, starts, align = vectors(context, builder, signature.args[:3], arguments[:3])
        scales = [repeated(builder, vector, value) for value in arguments[3:5]]
        with cgutils.for_range(builder, arguments[5]) as loop:
            place, *rows = (builder.gep(start, [loop.index]) for start in starts)
            products = (builder.fmul(builder.load(row, align=align), scale) for row, scale in zip(rows, scales, strict=True))
            builder.store(builder.fadd(builder.load(place, align=align), builder.fadd(*products)), place, align=align)
        return context.get_dummy_value()

    dtype = out.dtype
    return types.void(out, first, second, dtype, dtype, types.intp), code


@compiled
def dot(x, y):
    """Return <x, y>. The sum has LANES parts, so that vector instructions add in the same order on every CPU."""
    size, blocks = len(x), len(x) // LANES
    total = _dot_blocks(x, y, blocks)
    for i in range(blocks * LANES, size):
        total += x[i] * y[i]
    return total
