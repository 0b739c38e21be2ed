"""Gated linear attention (arXiv 2312.06635, section 4), a state S of C x E numbers a head, each of its rows with its own decay:

    S_t = diag(alpha_t) S_{t-1} + k_t v_t^T        out_t = scale S_t^T q_t        S_0 = 0

Token t reads v_j with the weight sum_c q_tc k_jc alpha_{j+1,c} .. alpha_tc. The second half of a chunk reads the first through a
product of matrices: q times the decay from the middle of the chunk to its token, k times that from its token to the middle. Each
half is halved in turn. Nothing is divided by a decay, and no factor is above 1: a decay may be as strong as it likes.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from cat.ops.common import without_autocast
from cat.types import Heads, State, Values

CHUNK = 32
"""Tokens that are halved again and again at most, a power of two; between two chunks the state is carried."""

Keys = Float[Tensor, "*chunks S C"]


def gated_linear_attend(q: Heads, k: Heads, v: Values, log_decay: Heads, *, scale: float) -> Values:
    """The outputs for log alpha `log_decay` <= 0, at a cost of L (chunk + C) C a head.

    Weights and states are in float32 at least, under autocast too.
    """
    return gated_linear_attend_next(q, k, v, log_decay, state=None, scale=scale)[0]


def gated_linear_attend_next(
    q: Heads, k: Heads, v: Values, log_decay: Heads, *, state: State | None, scale: float
) -> tuple[Values, State]:
    """The outputs of tokens that follow upon those of `state`, None before the first one; and the state after all of them."""
    wide = torch.promote_types(v.dtype, torch.float32)
    with without_autocast(q):
        q, k, log_decay, values = (x.to(wide) for x in (q, k, log_decay, v))
        outputs, end = _by_chunks(scale * q, k, log_decay.exp(), values, state)
    return outputs.to(v.dtype), end


def naive_gated_linear_attend(q: Heads, k: Heads, v: Values, log_decay: Heads, *, scale: float) -> Values:
    """The definition, one token at a time; the twin that `gated_linear_attend` is tested against."""
    state = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3])
    outputs = []
    for t in range(q.shape[2]):
        q_t, k_t, v_t, log_decay_t = (x[:, :, t, :, None] for x in (q, k, v, log_decay))
        state = log_decay_t.exp() * state + k_t @ v_t.mT
        outputs.append(scale * (state.mT @ q_t)[..., 0])
    return torch.stack(outputs, dim=2)


def _by_chunks(q: Heads, k: Heads, decay: Heads, v: Values, state: State | None) -> tuple[Values, State]:
    """A place in the last chunk that no token takes leaves the state as it is."""
    length = q.shape[2]
    # Of a few chunks, one that would be more than half empty costs more than halves in the place of all.
    size = CHUNK // 2 if length < 4 * CHUNK and -length % CHUNK >= CHUNK // 2 else CHUNK
    chunk = min(size, 1 << (length - 1).bit_length())
    inputs = ((q, 0), (k, 0), (decay, 1), (v, 0))
    q, k, decay, v = (F.pad(x, (0, 0, 0, -length % chunk), value=empty).unflatten(2, (-1, chunk)) for x, empty in inputs)
    weights, reading, writing, kept = _halved(q, k, decay)
    added = writing.mT @ v
    state = torch.zeros_like(added[:, :, 0]) if state is None else state
    states = []
    for kept_, added_ in zip(kept.mT.unbind(2), added.unbind(2), strict=True):
        states.append(state)
        state = kept_ * state + added_
    return (weights @ v + reading @ torch.stack(states, dim=2)).flatten(2, 3)[:, :, :length], state


def _halved(q: Keys, k: Keys, decay: Keys) -> tuple[Float[Tensor, "*chunks S S"], Keys, Keys, Float[Tensor, "*chunks 1 C"]]:
    """The weights within a chunk, q times the decay since its start, k times the decay until its end, and all of its decay."""
    if q.shape[-2] == 1:
        return (q * k).sum(-1, keepdim=True), q * decay, k, decay
    halves = _halved(*(x.unflatten(-2, (2, -1)) for x in (q, k, decay)))
    (first, second), (q_first, q_second), (k_first, k_second), (kept_first, kept_second) = (x.unbind(-3) for x in halves)
    rows = F.pad(first, (0, first.shape[-1])), torch.cat([q_second @ k_first.mT, second], dim=-1)
    reading = torch.cat([q_first, kept_first * q_second], dim=-2)
    writing = torch.cat([kept_second * k_first, k_second], dim=-2)
    return torch.cat(rows, dim=-2), reading, writing, kept_first * kept_second
