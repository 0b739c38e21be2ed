"""Based: softmax attention in which tokens that are far away have the second-order Taylor polynomial of exp for a weight.

    s_ij = scale <q_i, k_j>        out_i = sum_{j <= i} w_ij v_j / sum_{j <= i} w_ij
    w_ij = exp(s_ij)               where i - j < window
           1 + s_ij + s_ij^2 / 2   before: at least 1/2, and a product of features, <phi(q_i), phi(k_j)>

Taylor features and the sliding window are those of Based (arXiv 2402.18668, section 4), which has them in layers of their own, in
turn and with gated convolutions between them, the features on queries and keys of 16 channels. Here every layer has both under
one normaliser, as the linear and sliding window attention of LoLCATs (arXiv 2410.10254, section 3.3), its mixing factor one.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from cat.types import Heads, Values

CHUNK = 64
"""Queries that share a state: a sum over all keys that are out of the window for each of them."""

Chunks = Float[Tensor, "B H N S C"]


def taylor_attend(q: Heads, k: Heads, v: Values, *, scale: float, window: int) -> Values:
    """The cheaper of the two forms below, by the shapes alone, and in float32 at least."""
    length, channels = q.shape[2:]
    form = attend_by_scores if length <= 2 * count_features(channels) else attend_by_features
    with torch.autocast(q.device.type, enabled=False):
        return form(scale * wide(q), wide(k), wide(v), window=window).to(v.dtype)


def naive_taylor_attend(q: Heads, k: Heads, v: Values, *, scale: float, window: int) -> Values:
    """The definition, one query at a time; the twin that `taylor_attend` is tested against."""
    outputs = []
    for i in range(q.shape[2]):
        scores = scale * (k[:, :, : i + 1] @ q[:, :, i, :, None])
        far, near = scores.split([max(0, i + 1 - window), min(window, i + 1)], dim=2)
        weights = torch.cat([1 + far + far**2 / 2, near.exp()], dim=2)
        outputs.append((weights * v[:, :, : i + 1]).sum(2) / weights.sum(2))
    return torch.stack(outputs, dim=2)


def attend_by_scores(q: Heads, k: Heads, v: Values, *, window: int) -> Values:
    """One softmax over the logarithms of all weights, at a cost of L C a token."""
    i = torch.arange(q.shape[2], device=q.device)
    return log_weights(q @ k.mT, i[:, None] - i, window).softmax(-1) @ v


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
    count = (first - window).clamp(min=0)
    # No weight is below 1/2; their sum could be, where large features that cancel one another are rounded.
    total = far[..., -1:].clamp(min=count.clamp(min=1) / 2)

    i = first + torch.arange(CHUNK, device=q.device)[:, None]
    j = first + torch.arange(-window, CHUNK, device=q.device)
    k, v = (x.unfold(2, window + CHUNK, CHUNK) for x in (k, v))
    logs = log_weights(q @ k, (i - j).masked_fill(j < 0, -1), window)
    # A state competes as one token would that has the mean of its values, and the sum of their weights.
    weights = torch.cat([logs, total.log().masked_fill(count == 0, float("-inf"))], dim=-1).softmax(-1)
    out = weights[..., :-1] @ v.mT + weights[..., -1:] * (far / total)
    return out.flatten(2, 3)[:, :, :length, :-1]


def features(x: Chunks) -> Float[Tensor, "B H N S F"]:
    """The phi with <phi(x), phi(y)> = 1 + <x, y> + <x, y>^2 / 2: one, x, and the products of its pairs of channels."""
    a, b = torch.triu_indices(x.shape[-1], x.shape[-1], device=x.device)
    weight = x.new_ones(len(a)).masked_fill(a == b, math.sqrt(0.5))
    return torch.cat([torch.ones_like(x[..., :1]), x, x[..., a] * x[..., b] * weight], dim=-1)


def count_features(channels: int) -> int:
    """How many `features` there are."""
    return 1 + channels + channels * (channels + 1) // 2


def log_weights(scores: Float[Tensor, "B H *N L J"], distance: Int[Tensor, "*N L J"], window: int) -> Float[Tensor, "B H *N L J"]:
    """The logarithms of w_ij from s_ij and i - j, -inf where that is negative."""
    logs = torch.where(distance < window, scores, torch.log1p(scores * (1 + scores / 2)))
    return logs.masked_fill(distance < 0, float("-inf"))


def chunked(x: Heads) -> Chunks:
    """(B, H, L, C) as (B, H, L / CHUNK, CHUNK, C)."""
    return x.unflatten(2, (-1, CHUNK))


def wide(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """In float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
