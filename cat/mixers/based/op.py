"""Based: attention with a window and second-order Taylor features of exp.

    s_ij = scale <q_i, k_j>        out_i = sum_{j <= i} w_ij v_j / sum_{j <= i} w_ij
    w_ij = exp(s_ij)               if i - j < window
           1 + s_ij + s_ij^2 / 2   otherwise: at least 1/2, and a product of features, <phi(q_i), phi(k_j)>

Taylor features are those of Based (arXiv 2402.18668, section 4), which has sliding windows in separate layers: window = 0. With a
window, both are under one normalizer. This is the linear and sliding window attention of LoLCATs (arXiv 2410.10254, section 3.3)
with mixing factor 1.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from cat.ops.common import in_chunks, to_float32, without_autocast
from cat.ops.position import is_padding
from cat.types import Heads, Positions, Queries, Values

CHUNK = 64
"""Queries that share a state: the sum over the keys that are outside the window of all of them."""
QUERIES = 128
"""Queries whose weights are computed at a time. A shorter sequence is one block."""


def taylor_attend(
    q: Queries, k: Heads, v: Values, *, scale: float, window: int, positions: Positions | None = None
) -> Float[Tensor, "B H _ E"]:
    """Compute Taylor attention in at least float32.

    Uses the cheaper of the two forms below, chosen by shape. With `positions`, q has only the queries there.
    """
    length, channels = k.shape[2:]
    with without_autocast(q):
        inputs = scale * to_float32(q), to_float32(k), to_float32(v)
        if positions is not None or length <= 2 * count_features(channels):
            return attend_by_scores(*inputs, window=window, positions=positions).to(v.dtype)
        return attend_by_features(*inputs, window=window).to(v.dtype)


class Past(NamedTuple):
    """State of Taylor attention; its size is bounded for any number of tokens."""

    keys: Heads
    """Keys of the last tokens: at least the window; more tokens are kept until their number equals that of the features."""
    values: Float[Tensor, "B H _ E"]
    """Values of the same tokens; the last of the E channels is 1."""
    far: Float[Tensor, "B H F E"] | None
    """Sum of features times value over all tokens before those; None if there are none."""


def taylor_attend_step(
    q: Queries,
    k: Heads,
    v: Values,
    *,
    state: Past | None,
    length: int,
    scale: float,
    window: int,
    padding: Int[Tensor, " B"] | None = None,
) -> tuple[Float[Tensor, "B H _ E"], Past]:
    """Return the outputs after the `length` tokens of `state`, and the new state.

    `state` is None before the first token. q has the queries of all new tokens, or only of the last ones. `padding` is the number
    of the first tokens, in `state` or new, that have no weight. A query among them attends to itself only.
    """
    dtype = v.dtype
    with without_autocast(q):
        q, k, v = scale * to_float32(q), to_float32(k), F.pad(to_float32(v), (0, 1), value=1)
        if padding is not None and state is None:
            v = v.masked_fill(is_padding(padding, v.shape[2])[:, None, :, None], 0)
        keys, values, far = state or Past(k[:, :, :0], v[:, :, :0], None)
        summed = length - keys.shape[2]
        keys, values = torch.cat([keys, k], dim=2), torch.cat([values, v], dim=2)
        j = torch.arange(keys.shape[2], device=q.device)
        i = j[-q.shape[2] :, None]
        logs = log_weights(q @ keys.mT, i - j, window)
        far_count = torch.full_like(i, summed)
        if padding is not None:
            first = padding[:, None, None, None]
            logs = logs.masked_fill((j + summed < first) & (j != i), float("-inf"))
            far_count = (far_count - first).clamp(min=0)
        out = logs.softmax(-1) @ values if far is None else add_far_tokens(logs, values, features(q) @ far, far_count)
        if (outside := keys.shape[2] - window) >= count_features(k.shape[3]):
            added = features(keys[:, :, :outside]).mT @ values[:, :, :outside]
            keys, values, far = keys[:, :, outside:], values[:, :, outside:], added if far is None else far + added
    return out[..., :-1].to(dtype), Past(keys, values, far)


def naive_taylor_attend(
    q: Queries, k: Heads, v: Values, *, scale: float, window: int, positions: Positions | None = None
) -> Float[Tensor, "B H _ E"]:
    """Reference implementation of `taylor_attend`, one query at a time."""
    query_positions = torch.arange(q.shape[2]).expand(len(q), -1) if positions is None else positions
    outputs = []
    for b, sequence in enumerate(query_positions.tolist()):
        for a, i in enumerate(sequence):
            scores = scale * (k[b, :, : i + 1] @ q[b, :, a, :, None])
            far, near = scores.split([max(0, i + 1 - window), min(window, i + 1)], dim=1)
            weights = torch.cat([1 + far + far**2 / 2, near.exp()], dim=1)
            outputs.append((weights * v[b, :, : i + 1]).sum(1) / weights.sum(1))
    return torch.stack(outputs).unflatten(0, query_positions.shape).transpose(1, 2)


def attend_by_scores(
    q: Queries, k: Heads, v: Values, *, window: int, positions: Positions | None = None
) -> Float[Tensor, "B H _ E"]:
    """Take one softmax over the logarithms of all weights; costs L C per query."""
    if positions is None and k.shape[2] > QUERIES and not torch.compiler.is_compiling():
        return attend_by_blocks(q, k, v, window=window)
    j = torch.arange(k.shape[2], device=q.device)
    i = j if positions is None else positions[:, None]
    return log_weights(q @ k.mT, i[..., None] - j, window).softmax(-1) @ v


def attend_by_blocks(q: Heads, k: Heads, v: Values, *, window: int) -> Values:
    """Compute the weights of QUERIES queries at a time, without those of later keys.

    1 + s + s^2 / 2 = ((s + 1)^2 + 1) / 2: for keys outside the window of a block, weights are squares of products that have one
    more channel of ones.
    """
    q1, k1, v = (F.pad(x, (0, 1), value=1) for x in (q, k, v))  # the last channel of v sums the weights
    outputs = []
    for first, queries in zip(range(0, q.shape[2], QUERIES), q.split(QUERIES, dim=2), strict=True):
        last, near = first + queries.shape[2], max(0, first - window + 1)
        i, j = (torch.arange(start, last, device=q.device) for start in (first, near))
        logs = log_weights(queries @ k[:, :, near:last].mT, i[:, None] - j, window)
        peak = logs.detach().amax(-1, keepdim=True)
        peak = peak.clamp(min=0) if near > 0 else peak
        totals = (logs - peak).exp() @ v[:, :, near:last]
        if near > 0:
            squares = (q1[:, :, first:last] @ k1[:, :, :near].mT).square()
            totals = totals + (squares @ v[:, :, :near] + v[:, :, :near].sum(2, keepdim=True)) * ((-peak).exp() / 2)
        outputs.append(totals[..., :-1] / totals[..., -1:])
    return torch.cat(outputs, dim=2)


def attend_by_features(q: Heads, k: Heads, v: Values, *, window: int) -> Values:
    """Use scores near a chunk of queries and one state for all earlier keys.

    Costs (features + window + chunk) C per token.
    """
    length, padding = q.shape[2], (q.shape[2] + CHUNK - 1) // CHUNK * CHUNK - q.shape[2]
    # A last channel of ones sums the weights; it is zero for padding.
    v = F.pad(v, (0, 1), value=1)
    q = in_chunks(q, CHUNK)
    k, v = (F.pad(x, (0, 0, window, padding)) for x in (k, v))

    # Keys are delayed by the window: each chunk of them is outside the window of all queries of every later chunk.
    far_k, far_v = (in_chunks(x[:, :, : x.shape[2] - window], CHUNK) for x in (k, v))
    states = (features(far_k).mT @ far_v).cumsum(2)
    far = features(q) @ F.pad(states[:, :, :-1], (0, 0, 0, 0, 1, 0))
    first = torch.arange(0, q.shape[2] * CHUNK, CHUNK, device=q.device)[:, None, None]

    i = first + torch.arange(CHUNK, device=q.device)[:, None]
    j = first + torch.arange(-window, CHUNK, device=q.device)
    k, v = (x.unfold(2, window + CHUNK, CHUNK) for x in (k, v))
    logs = log_weights(q @ k, (i - j).masked_fill(j < 0, -1), window)
    return add_far_tokens(logs, v.mT, far, (first - window).clamp(min=0)).flatten(2, 3)[:, :, :length, :-1]


def add_far_tokens(
    logs: Float[Tensor, "B H *N A J"],
    v: Float[Tensor, "B H *N J E"],
    far: Float[Tensor, "B H *N A E"],
    count: Int[Tensor, "*#tokens #A 1"],
) -> Float[Tensor, "B H *N A E"]:
    """Return the weighted mean of `v` and of `count` further tokens.

    `logs` are the log weights of `v`. `far` is the weighted sum of the further tokens. The last channel of `v` and `far` is the
    weight.
    """
    # No weight is below 1/2. Their sum could be, when large features that cancel are rounded.
    total = far[..., -1:].clamp(min=count.clamp(min=1) / 2)
    # The far tokens enter the softmax as one token with their mean value and the sum of their weights.
    weights = torch.cat([logs, total.log().masked_fill(count == 0, float("-inf"))], dim=-1).softmax(-1)
    return weights[..., :-1] @ v + weights[..., -1:] * (far / total)


def features(x: Float[Tensor, "*tokens C"]) -> Float[Tensor, "*tokens F"]:
    """Return phi(x) with <phi(x), phi(y)> = 1 + <x, y> + <x, y>^2 / 2.

    phi(x) is one, x, and the products of pairs of channels.
    """
    a, b = torch.triu_indices(x.shape[-1], x.shape[-1], device=x.device)
    weight = x.new_ones(len(a)).masked_fill(a == b, math.sqrt(0.5))
    return torch.cat([torch.ones_like(x[..., :1]), x, x[..., a] * x[..., b] * weight], dim=-1)


def count_features(channels: int) -> int:
    return 1 + channels + channels * (channels + 1) // 2


def log_weights(scores: Float[Tensor, "*N A J"], distance: Int[Tensor, "*#N A J"], window: int) -> Float[Tensor, "*N A J"]:
    """Return log w_ij from scores s_ij and distances i - j; -inf for future tokens."""
    logs = torch.where(distance < window, scores, torch.log1p(scores * (1 + scores / 2)))
    return logs.masked_fill(distance < 0, float("-inf"))
