"""Causal linear attention with phi = elu + 1 (arXiv 2006.16236, equations 7 to 9):

    out_i = sum_{j <= i} <phi(q_i), phi(k_j)> v_j / sum_{j <= i} <phi(q_i), phi(k_j)>

With rotary positions, the features in the numerator are rotated and those in the denominator are not (arXiv 2104.09864, equation
19). The denominator stays positive, and the numerator depends on positions only through their distance.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from cat.ops.common import chunk_size, in_chunks, to_float32, without_autocast
from cat.ops.position import rotate
from cat.types import Heads, State, Values

CHUNK = 64
"""Tokens per chunk: within a chunk the sum is a masked product, between chunks it is a carried state."""


def linear_attend(q: Heads, k: Heads, v: Values, *, rotary: bool = False) -> Values:
    """Compute linear attention in at least float32, also under autocast.

    Costs L (chunk + C) C per head.
    """
    with without_autocast(q):
        q, k = features(to_float32(q)), features(to_float32(k))
        total = (q * k.cumsum(2)).sum(-1, keepdim=True)
        if rotary:
            q, k = rotate(q), rotate(k)
        return (causal_sum(q, k, to_float32(v)) / total).to(v.dtype)


class Sums(NamedTuple):
    """State of linear attention: sums over all tokens so far."""

    keys: Float[Tensor, "B H 1 C"]
    """Sum of phi(k_j)."""
    products: State
    """Sum of phi(k_j) v_j^T; with rotary positions, of the rotated features."""


def linear_attend_step(
    q: Heads,
    k: Heads,
    v: Values,
    *,
    state: Sums | None,
    start: int,
    rotary: bool = False,
    padding: Bool[Tensor, "B L"] | None = None,
) -> tuple[Values, Sums]:
    """Return the outputs after the `start` tokens of `state`, and the new state.

    `state` is None before the first token. Tokens that are `padding` have no weight.
    """
    with without_autocast(q):
        q, k, values = features(to_float32(q)), features(to_float32(k)), to_float32(v)
        if padding is not None:
            k = k.masked_fill(padding[:, None, :, None], 0)
        keys = k.cumsum(2) if state is None else state.keys + k.cumsum(2)
        total = (q * keys).sum(-1, keepdim=True)
        if padding is not None:  # a query without keys would divide by zero
            total = total.masked_fill(padding[:, None, :, None], 1)
        if rotary:
            q, k = rotate(q, start=start), rotate(k, start=start)
        products, step = k.mT @ values, causal_sum(q, k, values)
        if state is not None:
            products, step = state.products + products, step + q @ state.products
        return (step / total).to(v.dtype), Sums(keys[:, :, -1:], products)


def naive_linear_attend(q: Heads, k: Heads, v: Values, *, rotary: bool = False) -> Values:
    """Reference implementation of `linear_attend`, one query at a time."""
    q, k = features(q), features(k)
    rotated_q, rotated_k = (rotate(q), rotate(k)) if rotary else (q, k)
    outputs = []
    for i in range(q.shape[2]):
        total = (k[:, :, : i + 1] @ q[:, :, i, :, None]).sum(2)
        weights = rotated_k[:, :, : i + 1] @ rotated_q[:, :, i, :, None]
        outputs.append((weights * v[:, :, : i + 1]).sum(2) / total)
    return torch.stack(outputs, dim=2)


def features(x: Heads) -> Heads:
    """Return elu(x) + 1, computed as e^x below zero.

    There, 1 + (e^x - 1) would round to zero, and all-zero weights have no mean.
    """
    positive = x.relu()
    return positive + (x - positive).exp()


def causal_sum(q: Float[Tensor, "B H L F"], k: Float[Tensor, "B H L F"], v: Values) -> Values:
    """Return sum_{j <= i} <q_i, k_j> v_j.

    Uses a masked product within a chunk, and a sum of k v^T for all earlier chunks.
    """
    length = q.shape[2]
    chunk = chunk_size(length, CHUNK)
    q, k, v = (in_chunks(x, chunk) for x in (q, k, v))
    within = (q @ k.mT).tril() @ v
    # The state before chunk n, the sum over chunks 0 .. n - 1, is shifted and not subtracted: later tokens cause no rounding.
    states = (k.mT @ v).cumsum(2)
    before = F.pad(states[:, :, :-1], (0, 0, 0, 0, 1, 0))
    return (within + q @ before).flatten(2, 3)[:, :, :length]
