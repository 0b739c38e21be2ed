"""Gated linear attention (arXiv 2312.06635, section 4).

Each head has a C x E state S, and each row of S has its own decay:

    S_t = diag(alpha_t) S_{t-1} + k_t v_t^T        out_t = scale S_t^T q_t        S_0 = 0

The weight of v_j at token t is sum_c q_tc k_jc alpha_{j+1,c} .. alpha_tc. Queries in the second half of a chunk attend to the
first half by one matrix product: q times the decay from the middle to its token, and k times the decay from its token to the
middle. Each half is then split in the same way. Nothing is divided by a decay and no decay factor is above 1, so any decay is
stable.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from cat.ops.common import in_chunks, without_autocast
from cat.ops.scan.recurrence import matrix_loops, run_recurrence
from cat.types import Heads, State, Values

CHUNK = 32
"""Maximum number of tokens per chunk, a power of two; the state is carried from chunk to chunk."""

Keys = Float[Tensor, "*chunks S C"]


def gated_linear_attend(q: Heads, k: Heads, v: Values, log_decay: Heads, *, scale: float) -> Values:
    """Return the outputs; costs L (chunk + C) C per head.

    `log_decay` <= 0 is log alpha. Weights and states are in at least float32, also under autocast.
    """
    return gated_linear_attend_step(q, k, v, log_decay, state=None, scale=scale)[0]


def gated_linear_attend_step(
    q: Heads, k: Heads, v: Values, log_decay: Heads, *, state: State | None, scale: float
) -> tuple[Values, State]:
    """Return the outputs of the tokens after those of `state`, and the new state.

    `state` is None before the first token.
    """
    dtype = torch.promote_types(v.dtype, torch.float32)
    with without_autocast(q):
        q, k, log_decay, values = (x.to(dtype) for x in (q, k, log_decay, v))
        state = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3]) if state is None else state
        inputs = scale * q, k, log_decay, values, state
        loops = matrix_loops("gated", _by_chunks, *inputs)
        outputs, end = _by_chunks(*inputs) if loops is None else run_recurrence(loops, *inputs)
    return outputs.to(v.dtype), end


def naive_gated_linear_attend(q: Heads, k: Heads, v: Values, log_decay: Heads, *, scale: float) -> Values:
    """Reference implementation of `gated_linear_attend`, one token at a time."""
    state = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3])
    outputs = []
    for t in range(q.shape[2]):
        q_t, k_t, v_t, log_decay_t = (x[:, :, t, :, None] for x in (q, k, v, log_decay))
        state = log_decay_t.exp() * state + k_t @ v_t.mT
        outputs.append(scale * (state.mT @ q_t)[..., 0])
    return torch.stack(outputs, dim=2)


def _by_chunks(q: Heads, k: Heads, log_decay: Heads, v: Values, state: State) -> tuple[Values, State]:
    """Carry the state from chunk to chunk; padding leaves it unchanged."""
    length, decay = q.shape[2], log_decay.exp()
    chunk = _chunk_size(length)
    inputs = ((q, 0.0), (k, 0.0), (decay, 1.0), (v, 0.0))
    q, k, decay, v = (in_chunks(x, chunk, value=padding, unrolled=True) for x, padding in inputs)
    weights, decayed_q, decayed_k, total_decay = _within_chunks(q, k, decay)
    added = decayed_k.mT @ v
    states = []
    for decay_, added_ in zip(total_decay.mT.unbind(2), added.unbind(2), strict=True):
        states.append(state)
        state = decay_ * state + added_
    return (weights @ v + decayed_q @ torch.stack(states, dim=2)).flatten(2, 3)[:, :, :length], state


def _chunk_size(length: int) -> int:
    if torch.compiler.is_compiling():  # for all lengths
        return CHUNK
    # With few chunks, half-size chunks cost less than a last chunk that is more than half padding.
    size = CHUNK // 2 if length < 4 * CHUNK and -length % CHUNK >= CHUNK // 2 else CHUNK
    return min(size, 1 << (length - 1).bit_length())


def _within_chunks(
    q: Keys, k: Keys, decay: Keys
) -> tuple[Float[Tensor, "*chunks S S"], Keys, Keys, Float[Tensor, "*chunks 1 C"]]:
    """Return the weights within a chunk, decayed q and k, and the total decay.

    q is multiplied by the decay since the start of the chunk, k by the decay until its end.
    """
    if q.shape[-2] == 1:
        return (q * k).sum(-1, keepdim=True), q * decay, k, decay
    halves = _within_chunks(*(x.unflatten(-2, (2, -1)) for x in (q, k, decay)))
    (first, second), (q_first, q_second), (k_first, k_second), (decay_first, decay_second) = (x.unbind(-3) for x in halves)
    rows = F.pad(first, (0, first.shape[-1])), torch.cat([q_second @ k_first.mT, second], dim=-1)
    decayed_q = torch.cat([q_first, decay_first * q_second], dim=-2)
    decayed_k = torch.cat([decay_second * k_first, k_second], dim=-2)
    return torch.cat(rows, dim=-2), decayed_q, decayed_k, decay_first * decay_second
