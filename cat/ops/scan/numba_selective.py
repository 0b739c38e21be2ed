"""Loops of the selective scan of Mamba: h_t = exp(delta_t A) h_{t-1} + delta_t b_t x_t, y_t = <c_t, h_t>.

The innermost loops run over channels. The forward pass stores the state before every CHUNK tokens; the gradient computes the
states of a chunk again, in memory that fits into the cache of a core.
"""

import math

import numpy as np
import torch
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload
from torch import Tensor

from cat.ops.numba_loops import LANES, compiled, repeated, run_loop, sum_lanes, vectors, zero_of

BLOCK = 128
"""Channels that one thread computes at a time."""
CHUNK = 16
"""Tokens whose states are in memory at the same time during the gradient."""


def selective_forward(
    keep: bool, x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, start: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the outputs, the last state, and the states before each chunk if `keep`.

    x and `delta` are (B, L, E), b and c (B, L, S), `start` (B, E, S). a is (R, E, S): one for each of R equal parts of the batch.
    """
    batch, length, channels = x.shape
    y, end = torch.empty(x.shape, dtype=x.dtype), torch.empty(start.shape, dtype=x.dtype)
    kept = torch.empty(batch, -(-length // CHUNK) if keep else 0, a.shape[2], channels, dtype=x.dtype)
    run_loop(
        _selective, batch * _blocks(channels), *map(_array, (x, delta, a, b, c, start)), y.numpy(), end.numpy(), kept.numpy()
    )
    return y, end, kept


def selective_gradients(
    kept: Tensor, grad_y: Tensor, grad_end: Tensor, x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, start: Tensor
) -> tuple[Tensor, ...]:
    """Return the gradients of the inputs of `selective_forward`."""
    batch, length, channels = x.shape
    grad_x, grad_delta, grad_start = (torch.empty(t.shape, dtype=x.dtype) for t in (x, delta, start))
    grad_a, grad_b, grad_c = (torch.empty(t.shape, dtype=x.dtype) for t in (a, b, c))
    rates = np.empty((batch, a.shape[2], channels), grad_x.numpy().dtype)
    vectors = np.empty((2, _blocks(channels), batch, length, a.shape[2]), rates.dtype)
    run_loop(
        _selective_gradients, batch * _blocks(channels), *map(_array, (kept, grad_y, grad_end, x, delta, a, b, c)),
        grad_x.numpy(), grad_delta.numpy(), rates, *vectors, grad_start.numpy(),
    )  # fmt: skip
    _sum_parts(rates, vectors, grad_a.numpy(), grad_b.numpy(), grad_c.numpy())
    return grad_x, grad_delta, grad_a, grad_b, grad_c, grad_start


def _blocks(channels: int) -> int:
    return -(-channels // BLOCK)


def _array(x: Tensor) -> np.ndarray:
    return x.detach().contiguous().numpy()


@intrinsic
def _power_of_two(context, rounded):
    """2^n, if n is in the lowest bits of the mantissa of `rounded` and the bits above it are zero."""
    from llvmlite import ir  # a part of Numba

    def bits(context, builder, signature, arguments):
        size, shift, one = (32, 23, 0x3F800000) if rounded == types.float32 else (64, 52, 0x3FF0000000000000)
        integer = ir.IntType(size)
        exponent = builder.shl(builder.bitcast(arguments[0], integer), ir.Constant(integer, shift))
        return builder.bitcast(builder.add(exponent, ir.Constant(integer, one)), context.get_value_type(rounded))

    return rounded(rounded), bits


def _exp(z):
    """e^z to the rounding of the type, the same on every CPU, in operations with vector instructions.

    e^z = 2^n e^r with |r| <= log(2) / 2. Results below the smallest normal number are zero.
    """
    raise NotImplementedError  # compiled code has the versions below


def _constants(dtype, *, terms, shift, lowest, highest, log_2, log_2_rest):
    """Return the constants of e^z for a type.

    Adding the second one rounds to an integer. An integer times `log_2` is exact. The last one has the coefficients 1 / k!.
    """
    scalars = (dtype(value) for value in (1 / math.log(2), 1.5 * 2**shift, lowest, highest, log_2, log_2_rest, math.inf))
    return *scalars, tuple(dtype(1 / math.factorial(k)) for k in range(terms + 1))


PER_LOG_2, SHIFT, LOWEST, HIGHEST, LOG_2, LOG_2_REST, INFINITY, C = _constants(
    np.float32, terms=7, shift=23, lowest=-87, highest=88, log_2=0.693359375, log_2_rest=-2.12194440e-4
)
PER_LOG_2_64, SHIFT_64, LOWEST_64, HIGHEST_64, LOG_2_64, LOG_2_REST_64, INFINITY_64, D = _constants(
    np.float64, terms=13, shift=52, lowest=-708, highest=709, log_2=0.693145751953125, log_2_rest=1.42860682030941723e-6
)
ZERO = np.float32(0)


def _exp_32(z):
    shifted = z * PER_LOG_2 + SHIFT
    n = shifted - SHIFT
    r = (z - n * LOG_2) - n * LOG_2_REST
    series = ((((((C[7] * r + C[6]) * r + C[5]) * r + C[4]) * r + C[3]) * r + C[2]) * r + C[1]) * r + C[0]
    result = series * _power_of_two(shifted)
    result = ZERO if z < LOWEST else result
    return INFINITY if z > HIGHEST else result


def _exp_64(z):
    shifted = z * PER_LOG_2_64 + SHIFT_64
    n = shifted - SHIFT_64
    r = (z - n * LOG_2_64) - n * LOG_2_REST_64
    series = (((((D[13] * r + D[12]) * r + D[11]) * r + D[10]) * r + D[9]) * r + D[8]) * r + D[7]
    series = ((((((series * r + D[6]) * r + D[5]) * r + D[4]) * r + D[3]) * r + D[2]) * r + D[1]) * r + D[0]
    result = series * _power_of_two(shifted)
    result = 0.0 if z < LOWEST_64 else result
    return INFINITY_64 if z > HIGHEST_64 else result


@overload(_exp)
def _(z):
    return _exp_32 if z == types.float32 else _exp_64


@compiled
def _selective(begin, end, x, delta, a, b, c, start, y, last, kept):
    batch, length, channels = x.shape
    sizes, blocks = a.shape[2], -(-channels // BLOCK)
    most = min(BLOCK, channels)
    state, rates, inputs = np.empty((sizes, most), x.dtype), np.empty((sizes, most), x.dtype), np.empty(most, x.dtype)
    for unit in range(begin, end):
        i, first = unit // blocks, unit % blocks * BLOCK
        size = min(BLOCK, channels - first)
        member = i // (batch // len(a))
        for s in range(sizes):
            for e in range(size):
                rates[s, e] = a[member, first + e, s]
                state[s, e] = start[i, first + e, s]
        for t in range(length):
            if t % CHUNK == 0 and kept.shape[1]:
                kept[i, t // CHUNK, :, first : first + size] = state[:, :size]
            x_t, step, out = x[i, t, first : first + size], delta[i, t, first : first + size], y[i, t, first : first + size]
            for e in range(size):
                inputs[e] = step[e] * x_t[e]
                out[e] = 0
            for s in range(sizes):
                row, rate, b_s, c_s = state[s], rates[s], b[i, t, s], c[i, t, s]
                for e in range(size):
                    h = _exp(step[e] * rate[e]) * row[e] + b_s * inputs[e]
                    row[e] = h
                    out[e] += c_s * h
        for s in range(sizes):
            for e in range(size):
                last[i, first + e, s] = state[s, e]


@intrinsic
def _step_back(context, row, decay, before, after, rate, out_rate, gradient, inputs, step, out, out_inputs, b, c, blocks):
    """Add this token to `row`, the gradient of a state by later tokens; return the gradients of b and c.

    All have `blocks` times LANES values. Written as vector instructions: between this many arrays, a compiler checks for overlap.
    """

    def code(context, builder, signature, arguments):
        vector, starts, align = vectors(context, builder, signature.args[:11], arguments[:11])
        b_s, c_s = (repeated(builder, vector, value) for value in arguments[11:13])
        zero = repeated(builder, vector, zero_of(vector))
        sums = [cgutils.alloca_once_value(builder, zero) for _ in range(2)]

        def multiply_add(x, y, z):
            return builder.fadd(x, builder.fmul(y, z))

        with cgutils.for_range(builder, arguments[13]) as loop:
            places = [builder.gep(start, [loop.index]) for start in starts]
            values = [builder.load(place, align=align) for place in places]
            row, decay, before, after, rate, out_rate, gradient, inputs, step, out, out_inputs = values
            row = multiply_add(row, c_s, gradient)
            for total, pair in zip(sums, ((inputs, row), (gradient, after)), strict=True):
                builder.store(multiply_add(builder.load(total), *pair), total)
            builder.store(multiply_add(out_inputs, b_s, row), places[10], align=align)
            row = builder.fmul(row, decay)
            grad_exponent = builder.fmul(row, before)  # the gradient of delta_t a
            builder.store(row, places[0], align=align)
            builder.store(multiply_add(out_rate, grad_exponent, step), places[5], align=align)
            builder.store(multiply_add(out, grad_exponent, rate), places[9], align=align)
        return context.make_tuple(builder, signature.return_type, [sum_lanes(builder, builder.load(total)) for total in sums])

    dtype = row.dtype
    arrays = row, decay, before, after, rate, out_rate, gradient, inputs, step, out, out_inputs
    return types.UniTuple(dtype, 2)(*arrays, dtype, dtype, types.intp), code


@compiled
def _selective_gradients(
    begin, end, kept, grad_y, grad_end, x, delta, a, b, c, grad_x, grad_delta, grad_rates, grad_b, grad_c, grad_start
):
    batch, length, channels = x.shape
    sizes, blocks = a.shape[2], -(-channels // BLOCK)
    lanes = -(-min(BLOCK, channels) // LANES)
    padded, tokens = lanes * LANES, min(CHUNK, length)
    states, decays = np.zeros((tokens + 1, sizes, padded), x.dtype), np.zeros((tokens, sizes, padded), x.dtype)
    rates, later, out_rates = (
        np.zeros((sizes, padded), x.dtype), np.zeros((sizes, padded), x.dtype), np.zeros((sizes, padded), x.dtype)
    )  # fmt: skip
    step, gradient, inputs = np.zeros(padded, x.dtype), np.zeros(padded, x.dtype), np.zeros(padded, x.dtype)
    out, out_inputs = np.zeros(padded, x.dtype), np.zeros(padded, x.dtype)
    for unit in range(begin, end):
        i, block = unit // blocks, unit % blocks
        first = block * BLOCK
        size = min(BLOCK, channels - first)
        member = i // (batch // len(a))
        out_rates[:] = 0
        if size < padded:  # values of earlier channels in the padding must not count in sums
            later[:] = 0
            decays[:] = 0
            states[:] = 0
            gradient[:] = 0
            inputs[:] = 0
        for s in range(sizes):
            for e in range(size):
                rates[s, e] = a[member, first + e, s]
                later[s, e] = grad_end[i, first + e, s]
        for low in range((length - 1) // CHUNK * CHUNK, -1, -CHUNK):
            high = min(low + CHUNK, length)
            states[0, :, :size] = kept[i, low // CHUNK, :, first : first + size]
            for t in range(low, high):
                x_t, step_t = x[i, t, first : first + size], delta[i, t, first : first + size]
                for e in range(size):
                    inputs[e] = step_t[e] * x_t[e]
                for s in range(sizes):
                    rate, decay, b_s = rates[s], decays[t - low, s], b[i, t, s]
                    before, after = states[t - low, s], states[t - low + 1, s]
                    for e in range(size):
                        decay[e] = _exp(step_t[e] * rate[e])
                    for e in range(size):
                        after[e] = decay[e] * before[e] + b_s * inputs[e]
            for t in range(high - 1, low - 1, -1):
                x_t, step_t, grad_t = (
                    x[i, t, first : first + size], delta[i, t, first : first + size], grad_y[i, t, first : first + size]
                )  # fmt: skip
                for e in range(size):
                    step[e] = step_t[e]
                    inputs[e] = step_t[e] * x_t[e]
                    gradient[e] = grad_t[e]
                out[:] = 0
                out_inputs[:] = 0
                for s in range(sizes):
                    grad_b[block, i, t, s], grad_c[block, i, t, s] = _step_back(
                        later[s], decays[t - low, s], states[t - low, s], states[t - low + 1, s], rates[s], out_rates[s],
                        gradient, inputs, step, out, out_inputs, b[i, t, s], c[i, t, s], lanes,
                    )  # fmt: skip
                out_x, out_delta = grad_x[i, t, first : first + size], grad_delta[i, t, first : first + size]
                for e in range(size):
                    out_delta[e] = out[e] + out_inputs[e] * x_t[e]
                    out_x[e] = out_inputs[e] * step_t[e]
        grad_rates[i, :, first : first + size] = out_rates[:, :size]
        for s in range(sizes):
            for e in range(size):
                grad_start[i, first + e, s] = later[s, e]


@compiled
def _sum_parts(rates, vectors, grad_a, grad_b, grad_c):
    """Sum the gradients of rates over sequences, and those of vectors over blocks of channels."""
    grad_a[:] = 0
    grad_b[:] = 0
    grad_c[:] = 0
    sequences = len(rates) // max(1, len(grad_a))
    for i in range(len(rates)):
        grad_a[i // sequences] += rates[i].T
    for block in range(vectors.shape[1]):
        grad_b += vectors[0, block]
        grad_c += vectors[1, block]
