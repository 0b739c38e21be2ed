"""Based: softmax attention in which tokens that are far away have the second-order Taylor polynomial of exp for a weight.

    s_ij = scale <q_i, k_j>        out_i = sum_{j <= i} w_ij v_j / sum_{j <= i} w_ij
    w_ij = exp(s_ij)               where i - j < window
           1 + s_ij + s_ij^2 / 2   before: at least 1/2, and a product of features, <phi(q_i), phi(k_j)>

Taylor features and the sliding window are those of Based (arXiv 2402.18668, section 4), which has them in layers of their own, in
turn and with gated convolutions between them, the features on queries and keys of 16 channels. Here every layer has both under
one normaliser, as the linear and sliding window attention of LoLCATs (arXiv 2410.10254, section 3.3), its mixing factor one.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from cat.ops.common import to_float32, without_autocast
from cat.types import Heads, Positions, Queries, Values

CHUNK = 64
"""Queries that share a state: a sum over all keys that are out of the window for each of them."""

Chunks = Float[Tensor, "B H N S C"]


def taylor_attend(
    q: Queries, k: Heads, v: Values, *, scale: float, window: int, positions: Positions | None = None
) -> Float[Tensor, "B H _ E"]:
    """The cheaper of the two forms below, by the shapes alone, and in float32 at least.

    Of all queries or of those at positions `at`, which are then all there are in `q`.
    """
    length, channels = k.shape[2:]
    with without_autocast(q):
        wider = scale * to_float32(q), to_float32(k), to_float32(v)
        if positions is not None or length <= 2 * count_features(channels):
            return attend_by_scores(*wider, window=window, positions=positions).to(v.dtype)
        return attend_by_features(*wider, window=window).to(v.dtype)


class Past(NamedTuple):
    """What Taylor attention needs of the tokens so far, however many they are."""

    keys: Heads
    """Of the last of them: of the window and, until there are as many as features, of those before it."""
    values: Float[Tensor, "B H _ E"]
    """Of the same; the last of E channels is one."""
    far: Float[Tensor, "B H F E"] | None
    """The sum over all tokens before them of features times value; None where there are none."""


def taylor_attend_next(
    q: Queries, k: Heads, v: Values, *, state: Past | None, length: int, scale: float, window: int
) -> tuple[Float[Tensor, "B H _ E"], Past]:
    """The outputs of tokens that follow upon the `length` of `state`, None before the first one; and what is kept of all of them.

    The queries are those of every token, or of the last ones alone.
    """
    kind = v.dtype
    with without_autocast(q):
        q, k, v = scale * to_float32(q), to_float32(k), F.pad(to_float32(v), (0, 1), value=1)
        keys, values, far = state or Past(k[:, :, :0], v[:, :, :0], None)
        summed = length - keys.shape[2]
        keys, values = torch.cat([keys, k], dim=2), torch.cat([values, v], dim=2)
        j = torch.arange(keys.shape[2], device=q.device)
        i = j[-q.shape[2] :, None]
        logs = log_weights(q @ keys.mT, i - j, window)
        there = torch.full_like(i, summed)
        out = logs.softmax(-1) @ values if far is None else compete(logs, values, features(q) @ far, there)
        if (gone := keys.shape[2] - window) >= count_features(k.shape[3]):
            added = features(keys[:, :, :gone]).mT @ values[:, :, :gone]
            keys, values, far = keys[:, :, gone:], values[:, :, gone:], added if far is None else far + added
    return out[..., :-1].to(kind), Past(keys, values, far)


def naive_taylor_attend(
    q: Queries, k: Heads, v: Values, *, scale: float, window: int, positions: Positions | None = None
) -> Float[Tensor, "B H _ E"]:
    """The definition, one query at a time; the twin that `taylor_attend` is tested against."""
    places = torch.arange(q.shape[2]).expand(len(q), -1) if positions is None else positions
    outputs = []
    for b, sequence in enumerate(places.tolist()):
        for a, i in enumerate(sequence):
            scores = scale * (k[b, :, : i + 1] @ q[b, :, a, :, None])
            far, near = scores.split([max(0, i + 1 - window), min(window, i + 1)], dim=1)
            weights = torch.cat([1 + far + far**2 / 2, near.exp()], dim=1)
            outputs.append((weights * v[b, :, : i + 1]).sum(1) / weights.sum(1))
    return torch.stack(outputs).unflatten(0, places.shape).transpose(1, 2)


def attend_by_scores(
    q: Queries, k: Heads, v: Values, *, window: int, positions: Positions | None = None
) -> Float[Tensor, "B H _ E"]:
    """One softmax over the logarithms of all weights, at a cost of L C a query."""
    j = torch.arange(k.shape[2], device=q.device)
    i = j if positions is None else positions[:, None]
    return log_weights(q @ k.mT, i[..., None] - j, window).softmax(-1) @ v


def attend_by_features(q: Heads, k: Heads, v: Values, *, window: int) -> Values:
    """Scores near a chunk of queries and one state for all before, at a cost of (features + window + chunk) C a token."""
    length = q.shape[2]
    # A last channel of ones adds up the weights; it is zero where there is no token.
    v = F.pad(v, (0, 1), value=1)
    q = chunked(F.pad(q, (0, 0, 0, -length % CHUNK)))
    k, v = (F.pad(x, (0, 0, window, -length % CHUNK)) for x in (k, v))

    # A chunk of the keys as late as the window is out of the window for the queries of every chunk after it.
    states = (features(chunked(k[:, :, :-window])).mT @ chunked(v[:, :, :-window])).cumsum(2)
    far = features(q) @ F.pad(states[:, :, :-1], (0, 0, 0, 0, 1, 0))
    first = torch.arange(0, q.shape[2] * CHUNK, CHUNK, device=q.device)[:, None, None]

    i = first + torch.arange(CHUNK, device=q.device)[:, None]
    j = first + torch.arange(-window, CHUNK, device=q.device)
    k, v = (x.unfold(2, window + CHUNK, CHUNK) for x in (k, v))
    logs = log_weights(q @ k, (i - j).masked_fill(j < 0, -1), window)
    return compete(logs, v.mT, far, (first - window).clamp(min=0)).flatten(2, 3)[:, :, :length, :-1]


def compete(
    logs: Float[Tensor, "B H *N A J"],
    v: Float[Tensor, "B H *N J E"],
    far: Float[Tensor, "B H *N A E"],
    count: Int[Tensor, "*#N #A 1"],
) -> Float[Tensor, "B H *N A E"]:
    """The mean of values with the logarithms of their weights, and of `count` more of which `far` is the weighted sum.

    The last channel of values is one.
    """
    # No weight is below 1/2; their sum could be, where large features that cancel one another are rounded.
    total = far[..., -1:].clamp(min=count.clamp(min=1) / 2)
    # They compete as one token would that has the mean of their values, and the sum of their weights.
    weights = torch.cat([logs, total.log().masked_fill(count == 0, float("-inf"))], dim=-1).softmax(-1)
    return weights[..., :-1] @ v + weights[..., -1:] * (far / total)


def features(x: Float[Tensor, "*tokens C"]) -> Float[Tensor, "*tokens F"]:
    """The phi with <phi(x), phi(y)> = 1 + <x, y> + <x, y>^2 / 2: one, x, and the products of its pairs of channels."""
    a, b = torch.triu_indices(x.shape[-1], x.shape[-1], device=x.device)
    weight = x.new_ones(len(a)).masked_fill(a == b, math.sqrt(0.5))
    return torch.cat([torch.ones_like(x[..., :1]), x, x[..., a] * x[..., b] * weight], dim=-1)


def count_features(channels: int) -> int:
    """How many `features` there are."""
    return 1 + channels + channels * (channels + 1) // 2


def log_weights(scores: Float[Tensor, "*N A J"], distance: Int[Tensor, "*#N A J"], window: int) -> Float[Tensor, "*N A J"]:
    """The logarithms of w_ij from s_ij and i - j, -inf where that is negative."""
    logs = torch.where(distance < window, scores, torch.log1p(scores * (1 + scores / 2)))
    return logs.masked_fill(distance < 0, float("-inf"))


def chunked(x: Heads) -> Chunks:
    """(B, H, L, C) as (B, H, L / CHUNK, CHUNK, C)."""
    return x.unflatten(2, (-1, CHUNK))
