"""The delta rule with a gate and a C x C state S per head.

The rule is of arXiv 2406.06484, section 2.2; the gate is of arXiv 2412.06464, equation 10:

    S_t = alpha_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T        out_t = S_t^T q_t        S_0 = 0

For a unit key k_t, the update moves the value stored for k_t, S^T k_t, from that of alpha_t S_{t-1} towards v_t with step size
beta_t. It adds k_t u_t^T to alpha_t S_{t-1}. Within a chunk with initial state S, the u_t solve a triangular system, with
g_t = log alpha_1 + .. + log alpha_t counted from the chunk's first token:

    u_t + beta_t sum_{j < t} e^(g_t - g_j) <k_t, k_j> u_j = beta_t (v_t - e^(g_t) S^T k_t)
    out_t = e^(g_t) S^T q_t + sum_{j <= t} e^(g_t - g_j) <q_t, k_j> u_j
"""

import torch
from jaxtyping import Float
from torch import Tensor

from cat.ops.common import chunk_size, in_chunks, without_autocast
from cat.ops.scan.recurrence import matrix_loops, run_recurrence
from cat.types import Heads, State, Values

CHUNK = 32
"""Maximum number of tokens per triangular system; the state is carried from chunk to chunk."""

Rates = Float[Tensor, "B H L"]


def delta_rule(q: Heads, k: Heads, v: Values, beta: Rates, log_decay: Rates | None = None) -> Values:
    """Return the outputs; costs L (chunk + C) C per head.

    `beta` is the step size, `log_decay` <= 0 is log alpha; None is 0. States and systems are in at least float32, also under
    autocast.
    """
    return delta_rule_step(q, k, v, beta, log_decay, state=None)[0]


def delta_rule_step(
    q: Heads, k: Heads, v: Values, beta: Rates, log_decay: Rates | None = None, *, state: State | None
) -> tuple[Values, State]:
    """Return the outputs of the tokens after those of `state`, and the new state.

    `state` is None before the first token.
    """
    dtype = torch.promote_types(v.dtype, torch.float32)
    with without_autocast(q):
        log_decay = torch.zeros_like(beta) if log_decay is None else log_decay
        q, k, values, strength, log_decay = (x.to(dtype) for x in (q, k, v, beta[..., None], log_decay[..., None]))
        state = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3]) if state is None else state
        inputs = q, k, values, strength, log_decay, state
        loops = matrix_loops("delta", _by_chunks, *inputs)
        outputs, end = _by_chunks(*inputs) if loops is None else run_recurrence(loops, *inputs)
    return outputs.to(v.dtype), end


def naive_delta_rule(q: Heads, k: Heads, v: Values, beta: Rates, log_decay: Rates | None = None) -> Values:
    """Reference implementation of `delta_rule`, one token at a time."""
    state = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3])
    identity = torch.eye(q.shape[3], dtype=q.dtype, device=q.device)
    outputs = []
    for t in range(q.shape[2]):
        q_t, k_t, v_t, beta_t = (x[:, :, t, :, None] for x in (q, k, v, beta[..., None]))
        state = (identity - beta_t * k_t @ k_t.mT) @ state
        if log_decay is not None:
            state = log_decay[:, :, t, None, None].exp() * state
        state = state + beta_t * k_t @ v_t.mT
        outputs.append((state.mT @ q_t)[..., 0])
    return torch.stack(outputs, dim=2)


def _by_chunks(
    q: Heads, k: Heads, v: Values, beta: Float[Tensor, "B H L 1"], log_decay: Float[Tensor, "B H L 1"], state: State
) -> tuple[Values, State]:
    """Compute in chunks of nearly equal length.

    One token more than a chunk then does not need a second chunk of padding. Padding leaves the state unchanged.
    """
    length = q.shape[2]
    chunk = chunk_size(-(-length // -(-length // CHUNK)), CHUNK)
    q, k, v, beta, log_decay = (in_chunks(x, chunk, unrolled=True) for x in (q, k, v, beta, log_decay))
    total = log_decay.cumsum(3)
    future = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).triu(1)
    # Masked before exp: exp overflows for future tokens, and the gradient of zero times infinity is NaN.
    decay = (total - total.mT).masked_fill(future, float("-inf")).exp()

    outputs = []
    for q_, k_, v_, beta_, carry, decay_ in zip(*(x.unbind(2) for x in (q, k, v, beta, total.exp(), decay)), strict=True):
        system = beta_ * (k_ @ k_.mT) * decay_  # the diagonal is taken as ones, the upper triangle is zero
        u = torch.linalg.solve_triangular(system, beta_ * (v_ - carry * (k_ @ state)), upper=False, unitriangular=True)
        outputs.append(carry * (q_ @ state) + (q_ @ k_.mT * decay_) @ u)
        state = carry[:, :, -1:] * state + (k_ * decay_[:, :, -1, :, None]).mT @ u
    return torch.cat(outputs, dim=2)[:, :, :length], state
