"""Causal linear attention with the feature map phi = elu + 1 (arXiv 2006.16236, equations 7 to 9):

    out_i = sum_{j <= i} <phi(q_i), phi(k_j)> v_j / sum_{j <= i} <phi(q_i), phi(k_j)>

With rotary position the features of the numerator are turned, those of the denominator are not (arXiv 2104.09864, equation 19):
the denominator stays positive, and a weight depends on its distance alone.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from cat.ops.common import to_float32, without_autocast
from cat.ops.position import rotate
from cat.types import Heads, State, Values

CHUNK = 64
"""Tokens between two states: inside a chunk the sum is taken as a masked product, between chunks it is carried."""


def linear_attend(q: Heads, k: Heads, v: Values, *, rotary: bool = False) -> Values:
    """Linear attention at a cost of L (chunk + C) C a head, in float32 at least, under autocast too."""
    with without_autocast(q):
        q, k = features(to_float32(q)), features(to_float32(k))
        total = (q * k.cumsum(2)).sum(-1, keepdim=True)
        if rotary:
            q, k = rotate(q), rotate(k)
        return (causal_sum(q, k, to_float32(v)) / total).to(v.dtype)


class Sums(NamedTuple):
    """What linear attention needs of the tokens so far, however many they are."""

    keys: Float[Tensor, "B H 1 C"]
    """Of phi(k_j)."""
    products: State
    """Of phi(k_j) v_j^T, with turned features where there is rotary position."""


def linear_attend_next(
    q: Heads, k: Heads, v: Values, *, state: Sums | None, start: int, rotary: bool = False
) -> tuple[Values, Sums]:
    """Linear attention of tokens from `start` on, to themselves and to those of `state`; and the sums of all.

    `state` is None before the first token.
    """
    with without_autocast(q):
        q, k, values = features(to_float32(q)), features(to_float32(k)), to_float32(v)
        keys = k.cumsum(2) if state is None else state.keys + k.cumsum(2)
        total = (q * keys).sum(-1, keepdim=True)
        if rotary:
            q, k = rotate(q, start=start), rotate(k, start=start)
        products, step = k.mT @ values, causal_sum(q, k, values)
        if state is not None:
            products, step = state.products + products, step + q @ state.products
        return (step / total).to(v.dtype), Sums(keys[:, :, -1:], products)


def naive_linear_attend(q: Heads, k: Heads, v: Values, *, rotary: bool = False) -> Values:
    """The definition, one query at a time; the twin that `linear_attend` is tested against."""
    q, k = features(q), features(k)
    turned_q, turned_k = (rotate(q), rotate(k)) if rotary else (q, k)
    outputs = []
    for i in range(q.shape[2]):
        total = (k[:, :, : i + 1] @ q[:, :, i, :, None]).sum(2)
        weights = turned_k[:, :, : i + 1] @ turned_q[:, :, i, :, None]
        outputs.append((weights * v[:, :, : i + 1]).sum(2) / total)
    return torch.stack(outputs, dim=2)


def features(x: Heads) -> Heads:
    """elu(x) + 1, with e^x itself below zero: 1 + (e^x - 1) rounds to zero there, and a row of zeros has no mean."""
    positive = x.relu()
    return positive + (x - positive).exp()


def causal_sum(q: Float[Tensor, "B H L F"], k: Float[Tensor, "B H L F"], v: Values) -> Values:
    """sum_{j <= i} <q_i, k_j> v_j: within a chunk as a masked product, over all chunks before it through their sum of k v^T."""
    length = q.shape[2]
    chunk = min(CHUNK, length)
    q, k, v = (F.pad(x, (0, 0, 0, -length % chunk)).unflatten(2, (-1, chunk)) for x in (q, k, v))
    within = (q @ k.mT).tril() @ v
    # The state before chunk n is the sum over chunks 0 .. n - 1, shifted and not subtracted: no rounding of what is to come.
    states = (k.mT @ v).cumsum(2)
    before = F.pad(states[:, :, :-1], (0, 0, 0, 0, 1, 0))
    return (within + q @ before).flatten(2, 3)[:, :, :length]
