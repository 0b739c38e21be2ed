"""Loops of recurrences with a matrix per head as state: gated linear attention and the delta rule, token by token.

The forward pass has keys as rows of the state. Both passes of the gradient have values as rows, so that sums over values are sums
of rows. States are computed again for the gradient, in the order of the tokens, so none is stored. The gradient of a decay is
a sum over later tokens: with D_t the gradient of state S_t, the sum of the products D_t S_t changes from token to token by what
the token reads and writes.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cat.ops.numba_loops import LANES, add_rows, compiled, dot, memory, run_loop, update_rows


def gated_forward(keep: bool, q: Tensor, k: Tensor, log_decay: Tensor, v: Tensor, start: Tensor) -> tuple[Tensor, ...]:
    """S_t = diag(alpha_t) S_{t-1} + k_t v_t^T, out_t = S_t^T q_t. Keeps alpha.

    q, k and `log_decay` are (B, H, L, C), v is (B, H, L, E), `start` (B, H, C, E).
    """
    decay = log_decay.exp()
    y, state = _like(v), start.clone(memory_format=torch.contiguous_format)
    run_loop(_gated, _heads(q), q.shape[1], q.shape[2], *map(_rows, (q, k, decay, v, y)), _matrices(state))
    return y, state, decay


def gated_gradients(
    decay: Tensor, grad_y: Tensor, grad_state: Tensor, q: Tensor, k: Tensor, log_decay: Tensor, v: Tensor, start: Tensor
) -> tuple[Tensor, ...]:
    """Return the gradients of the inputs of `gated_forward`."""
    gradients = *(_like(x) for x in (q, k, log_decay, v)), torch.empty(start.shape, dtype=start.dtype)
    run_loop(
        _gated_gradients, _heads(q), q.shape[1], q.shape[2], *map(_rows, (q, k, decay, v, grad_y)), _matrices(start.contiguous()),
        _matrices(grad_state.contiguous()), *map(_rows, gradients[:4]), _matrices(gradients[4]),
    )  # fmt: skip
    return gradients


def delta_forward(
    keep: bool, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor, start: Tensor
) -> tuple[Tensor, ...]:
    """S_t = alpha_t S_{t-1} + beta_t k_t w_t^T with w_t = v_t - alpha_t S_{t-1}^T k_t, out_t = S_t^T q_t. Keeps w.

    `beta` and `log_decay` are (B, H, L, 1).
    """
    y, w, state = _like(v), _like(v), start.clone(memory_format=torch.contiguous_format)
    rows = map(_rows, (q, k, v, beta, log_decay.exp(), y, w))
    run_loop(_delta, _heads(q), q.shape[1], q.shape[2], *rows, _matrices(state))
    return y, state, w


def delta_gradients(
    w: Tensor, grad_y: Tensor, grad_state: Tensor, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor, start: Tensor
) -> tuple[Tensor, ...]:
    """Return the gradients of the inputs of `delta_forward`."""
    gradients = *(_like(x) for x in (q, k, v, beta, log_decay)), torch.empty(start.shape, dtype=start.dtype)
    rows = map(_rows, (q, k, v, beta, log_decay.exp(), w, grad_y))
    run_loop(
        _delta_gradients, _heads(q), q.shape[1], q.shape[2], *rows, _matrices(start.contiguous()),
        _matrices(grad_state.contiguous()), *map(_rows, gradients[:5]), _matrices(gradients[5]),
    )  # fmt: skip
    return gradients


def _heads(x: Tensor) -> int:
    return x.shape[0] * x.shape[1]


def _like(x: Tensor) -> Tensor:
    """Allocate (B, H, L, C) with the values of a token adjacent in memory, as the layers concatenate heads."""
    batch, heads, length, channels = x.shape
    return torch.empty(batch, length, heads, channels, dtype=x.dtype).transpose(1, 2)


def _rows(x: Tensor) -> tuple[Any, ...]:
    """Return memory, strides and the size of a row, for any layout with adjacent channels."""
    x = x if x.stride(3) == 1 else x.contiguous()
    return memory(x), *x.stride()[:3], x.shape[3]


def _matrices(x: Tensor) -> np.ndarray:
    return x.detach().flatten(0, 1).numpy()


@compiled
def _row(x, b, h, t):
    values, s_b, s_h, s_t, size = x
    first = b * s_b + h * s_h + t * s_t
    return values[first : first + size]


@compiled
def _write_and_read(state, decay, k, v, q, y):
    """Decay the state, add k v^T, and read y = S^T q."""
    keys, values = state.shape
    y[:] = 0
    for c in range(0, keys - 1, 2):  # two rows each time that v and y are loaded
        first, second = state[c], state[c + 1]
        a0, a1, k0, k1, q0, q1 = decay[c], decay[c + 1], k[c], k[c + 1], q[c], q[c + 1]
        for e in range(values):
            s0 = a0 * first[e] + k0 * v[e]
            s1 = a1 * second[e] + k1 * v[e]
            first[e] = s0
            second[e] = s1
            y[e] += q0 * s0 + q1 * s1
    if keys % 2:
        c = keys - 1
        row, a0, k0, q0 = state[c], decay[c], k[c], q[c]
        for e in range(values):
            s0 = a0 * row[e] + k0 * v[e]
            row[e] = s0
            y[e] += q0 * s0


@compiled
def _gated(begin, end, heads, length, q, k, decay, v, y, state):
    for p in range(begin, end):
        b, h = p // heads, p % heads
        for t in range(length):
            _write_and_read(
                state[p], _row(decay, b, h, t), _row(k, b, h, t), _row(v, b, h, t), _row(q, b, h, t), _row(y, b, h, t)
            )


@compiled
def _fill(row, values):
    """Copy the values of a token to a row whose padding is zero."""
    for c in range(len(values)):
        row[c] = values[c]


@compiled
def _gated_gradients(
    begin, end, heads, length, q, k, decay, v, grad_y, start, grad_end, grad_q, grad_k, grad_decay, grad_v, grad_start
):
    _, keys, values = start.shape
    blocks, pairs = -(-keys // LANES), -(-values // 2)
    # Rows are padded to whole vectors, and values to an even number.
    state, grad_state = np.zeros((2 * pairs, blocks * LANES), start.dtype), np.zeros((2 * pairs, blocks * LANES), start.dtype)
    factors = np.zeros(blocks * LANES, start.dtype)
    q_t = np.zeros(blocks * LANES, start.dtype)
    k_t = np.zeros(blocks * LANES, start.dtype)
    out = np.zeros(blocks * LANES, start.dtype)
    total = np.zeros(blocks * LANES, start.dtype)
    v_t = np.zeros(2 * pairs, start.dtype)
    gradient = np.zeros(2 * pairs, start.dtype)
    out_v = np.zeros(2 * pairs, start.dtype)
    for p in range(begin, end):
        b, h = p // heads, p % heads
        state[:] = 0  # also the padding, where another sequence may have left NaN
        state[:values, :keys] = start[p].T
        for t in range(length):
            _fill(factors, _row(decay, b, h, t))
            _fill(k_t, _row(k, b, h, t))
            _fill(v_t, _row(v, b, h, t))
            _fill(gradient, _row(grad_y, b, h, t))
            out[:] = 0
            for e in range(0, values, 2):
                first, second = state[e], state[e + 1]
                update_rows(first, second, factors, k_t, v_t[e], v_t[e + 1], k_t, blocks)
                add_rows(out, first, second, gradient[e], gradient[e + 1], blocks)
            _row(grad_q, b, h, t)[:] = out[:keys]
        grad_state[:] = 0
        grad_state[:values, :keys] = grad_end[p].T
        total[:] = 0
        for e in range(values):
            for c in range(keys):
                total[c] += grad_state[e, c] * state[e, c]
        factors[:] = 1
        for t in range(length - 1, -1, -1):
            _fill(q_t, _row(q, b, h, t))
            _fill(k_t, _row(k, b, h, t))
            _fill(v_t, _row(v, b, h, t))
            _fill(gradient, _row(grad_y, b, h, t))
            out[:] = 0
            for e in range(0, values, 2):
                first, second = grad_state[e], grad_state[e + 1]
                out_v[e], out_v[e + 1] = update_rows(first, second, factors, q_t, gradient[e], gradient[e + 1], k_t, blocks)
                add_rows(out, first, second, v_t[e], v_t[e + 1], blocks)
            _row(grad_v, b, h, t)[:] = out_v[:values]
            _row(grad_k, b, h, t)[:] = out[:keys]
            out_q, out_decay = _row(grad_q, b, h, t), _row(grad_decay, b, h, t)
            for c in range(keys):
                total[c] += q_t[c] * out_q[c] - k_t[c] * out[c]
                out_decay[c] = total[c]
            _fill(factors, _row(decay, b, h, t))
        for e in range(values):
            for c in range(keys):
                grad_start[p, c, e] = factors[c] * grad_state[e, c]


@compiled
def _delta(begin, end, heads, length, q, k, v, beta, decay, y, w, state):
    _, keys, values = state.shape
    read, alphas = np.empty(values, state.dtype), np.empty(keys, state.dtype)
    for p in range(begin, end):
        b, h = p // heads, p % heads
        s = state[p]
        for t in range(length):
            k_t, v_t, w_t = _row(k, b, h, t), _row(v, b, h, t), _row(w, b, h, t)
            alpha, strength = _row(decay, b, h, t)[0], _row(beta, b, h, t)[0]
            read[:] = 0
            for c in range(0, keys - 3, 4):  # four rows each time that the sums are loaded and stored
                r0, r1, r2, r3 = s[c], s[c + 1], s[c + 2], s[c + 3]
                k0, k1, k2, k3 = k_t[c], k_t[c + 1], k_t[c + 2], k_t[c + 3]
                for e in range(values):
                    read[e] += (k0 * r0[e] + k1 * r1[e]) + (k2 * r2[e] + k3 * r3[e])
            for c in range(keys // 4 * 4, keys):
                r0, k0 = s[c], k_t[c]
                for e in range(values):
                    read[e] += k0 * r0[e]
            for e in range(values):
                w_t[e] = v_t[e] - alpha * read[e]
                read[e] = strength * w_t[e]
            alphas[:] = alpha
            _write_and_read(s, alphas, k_t, read, _row(q, b, h, t), _row(y, b, h, t))


@compiled
def _delta_gradients(
    begin, end, heads, length, q, k, v, beta, decay, w, grad_y, start, grad_end, grad_q, grad_k, grad_v, grad_beta, grad_decay,
    grad_start,
):  # fmt: skip
    _, keys, values = start.shape
    blocks, pairs = -(-keys // LANES), -(-values // 2)
    # Rows are padded to whole vectors, and values to an even number.
    state, grad_state = np.zeros((2 * pairs, blocks * LANES), start.dtype), np.zeros((2 * pairs, blocks * LANES), start.dtype)
    ones = np.zeros(blocks * LANES, start.dtype)
    alphas = np.zeros(blocks * LANES, start.dtype)
    q_t = np.zeros(blocks * LANES, start.dtype)
    k_t = np.zeros(blocks * LANES, start.dtype)
    out_q = np.zeros(blocks * LANES, start.dtype)
    out_k = np.zeros(blocks * LANES, start.dtype)
    written = np.zeros(2 * pairs, start.dtype)
    read = np.zeros(2 * pairs, start.dtype)
    gradient = np.zeros(2 * pairs, start.dtype)
    out_v = np.zeros(2 * pairs, start.dtype)
    ones[:] = 1
    for p in range(begin, end):
        b, h = p // heads, p % heads
        grad_state[:] = 0
        grad_state[:values, :keys] = grad_end[p].T
        for t in range(length - 1, -1, -1):
            w_t, alpha, strength = _row(w, b, h, t), _row(decay, b, h, t)[0], _row(beta, b, h, t)[0]
            _fill(q_t, _row(q, b, h, t))
            _fill(k_t, _row(k, b, h, t))
            _fill(gradient, _row(grad_y, b, h, t))
            alphas[:] = alpha
            out_k[:] = 0
            for e in range(values):
                written[e] = strength * w_t[e]
            for e in range(0, values, 2):
                first, second = grad_state[e], grad_state[e + 1]
                g0, g1 = update_rows(first, second, ones, q_t, gradient[e], gradient[e + 1], k_t, blocks)
                out_v[e], out_v[e + 1] = g0, g1  # the gradients of `written`
                add_rows(out_k, first, second, written[e], written[e + 1], blocks)
                update_rows(first, second, alphas, k_t, -alpha * strength * g0, -alpha * strength * g1, k_t, blocks)
            _row(grad_beta, b, h, t)[0] = dot(out_v[:values], w_t)
            _row(grad_k, b, h, t)[:] = out_k[:keys]
            row = _row(grad_v, b, h, t)
            for e in range(values):
                row[e] = strength * out_v[e]
        grad_start[p] = grad_state[:values, :keys].T
        state[:] = 0  # also the padding, where another sequence may have left NaN
        state[:values, :keys] = start[p].T
        for t in range(length):
            w_t, alpha, strength, grad_v_t = (
                _row(w, b, h, t), _row(decay, b, h, t)[0], _row(beta, b, h, t)[0], _row(grad_v, b, h, t)
            )  # fmt: skip
            _fill(k_t, _row(k, b, h, t))
            _fill(out_k, _row(grad_k, b, h, t))
            _fill(gradient, _row(grad_y, b, h, t))
            alphas[:] = alpha
            out_q[:] = 0
            for e in range(values):
                written[e], read[e] = strength * w_t[e], -alpha * grad_v_t[e]
            for e in range(0, values, 2):
                first, second = state[e], state[e + 1]
                add_rows(out_k, first, second, read[e], read[e + 1], blocks)
                update_rows(first, second, alphas, k_t, written[e], written[e + 1], k_t, blocks)
                add_rows(out_q, first, second, gradient[e], gradient[e + 1], blocks)
            _row(grad_q, b, h, t)[:] = out_q[:keys]
            _row(grad_k, b, h, t)[:] = out_k[:keys]
        total = start.dtype.type(0)
        for e in range(values):
            for c in range(keys):
                total += state[e, c] * grad_end[p, c, e]
        for t in range(length - 1, -1, -1):
            total += dot(_row(q, b, h, t), _row(grad_q, b, h, t)) - dot(_row(v, b, h, t), _row(grad_v, b, h, t))
            _row(grad_decay, b, h, t)[0] = total


LOOPS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "gated": (gated_forward, gated_gradients),
    "delta": (delta_forward, delta_gradients),
}
"""Forward pass and gradient of each recurrence."""
