"""Performer: softmax attention with positive orthogonal random features.

This is FAVOR+ (arXiv 2009.14794, lemma 1):

    out_i = sum_{j <= i} <phi(q_i), phi(k_j)> v_j / sum_{j <= i} <phi(q_i), phi(k_j)>
    phi(x)_m = exp(<w_m, y> - |y|^2 / 2) / sqrt(M)    y = sqrt(scale) x

The mean of <phi(q), phi(k)> over normal directions w is exp(scale <q, k>).
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from cat.ops.common import chunk_size, in_chunks, to_float32, without_autocast
from cat.types import Heads, Values

CHUNK = 64
"""Tokens per chunk; the state is carried from chunk to chunk."""
MIN_TOTAL = 1e-30
"""Minimum sum of a query's weights; far enough above the smallest float32 for finite gradients."""

Directions = Float[Tensor, "H M C"]
Features = Float[Tensor, "B H L M"]
Logs = Float[Tensor, "B H _ 1"]


def performer_attend(q: Heads, k: Heads, v: Values, *, scale: float, directions: Directions) -> Values:
    """Compute attention with random features in at least float32.

    Costs L (chunk + C) M per head. A common factor of a query's weights cancels. So each query's features are scaled to a maximum
    of 1, and so are the features of all keys up to it. No key depends on later ones, and float32 does not overflow for any head
    width or vector norm. If vectors are so long that all keys are near zero in the features that are large for a query, its
    weights sum to less than MIN_TOTAL. The normalized weights then sum to less than one.
    """
    return performer_attend_step(q, k, v, state=None, scale=scale, directions=directions)[0]


class Sums(NamedTuple):
    """State of attention with random features: a sum over all tokens so far."""

    log_max: Logs
    """Logarithm of the largest feature of any key."""
    products: Float[Tensor, "B H M E"]
    """Sum of features, divided by the largest, times value; the last of the E value channels is 1."""


def performer_attend_step(
    q: Heads,
    k: Heads,
    v: Values,
    *,
    state: Sums | None,
    scale: float,
    directions: Directions,
    padding: Bool[Tensor, "B L"] | None = None,
) -> tuple[Values, Sums]:
    """Return the outputs of the tokens after those of `state`, and the new state.

    `state` is None before the first token. Tokens that are `padding` have no weight.
    """
    with without_autocast(q):
        # A last channel of ones sums the weights.
        q, k, ones, directions = map(to_float32, (q, k, F.pad(v, (0, 1), value=1), directions))
        q_logs, k_logs = (math.sqrt(scale) * x @ directions.mT for x in (q, k))
        k_logs = k_logs - scale * k.square().sum(-1, keepdim=True) / 2
        peak = k_logs.detach().amax(-1, keepdim=True)
        q_features, k_features = torch.exp(q_logs - q_logs.detach().amax(-1, keepdim=True)), torch.exp(k_logs - peak)
        if padding is not None:
            padding = padding[:, None, :, None]
            ones = ones.masked_fill(padding, 0)
            # The maximum is that of the tokens: at padding before them, that of the first token.
            peak = torch.where(padding, peak.gather(2, padding.sum(2, keepdim=True).expand_as(peak[:, :, :1])), peak)
        totals, sums = _causal_sum(q_features, k_features, ones, peak, state)
    return (totals[..., :-1] / totals[..., -1:].clamp(min=MIN_TOTAL)).to(v.dtype), sums


def _causal_sum(q: Features, k: Features, v: Values, peak: Logs, sums: Sums | None) -> tuple[Values, Sums]:
    """Return sum_{j <= i} e^(peak_j - log_max_i) <q_i, k_j> v_j.

    log_max_i is the largest peak up to i. No factor is above 1.
    """
    if sums is None:
        none = peak.new_full((*peak.shape[:2], 1, 1), float("-inf"))
        sums = Sums(none, q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1]))
    before, state = sums
    length = q.shape[2]
    chunk = chunk_size(length, CHUNK)
    q, k, v = (in_chunks(x, chunk, unrolled=True) for x in (q, k, v))
    peak = in_chunks(peak, chunk, value=float("-inf"), unrolled=True)  # padding is never the maximum
    log_max = torch.maximum(peak.flatten(2, 3).cummax(2).values, before).unflatten(2, peak.shape[2:4])
    future = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).triu(1)
    factor = (peak.mT - log_max).exp().masked_fill(future, 0)
    end = log_max[:, :, :, -1:]
    start = torch.cat([before[:, :, None], end[:, :, :-1]], dim=2)
    states = []
    for scale, added in zip((start - end).exp().unbind(2), ((k * (peak - end).exp()).mT @ v).unbind(2), strict=True):
        states.append(state)
        state = scale * state + added
    totals = (q @ k.mT * factor) @ v + (start - log_max).exp() * (q @ torch.stack(states, dim=2))
    return totals.flatten(2, 3)[:, :, :length], Sums(end[:, :, -1], state)


def naive_performer_attend(q: Heads, k: Heads, v: Values, *, scale: float, directions: Directions) -> Values:
    """Reference implementation of `performer_attend`, one query at a time."""
    q_features, k_features = (
        torch.exp(math.sqrt(scale) * x @ directions.mT - scale * x.square().sum(-1, keepdim=True) / 2)
        / math.sqrt(directions.shape[1])
        for x in (q, k)
    )
    outputs = []
    for i in range(q.shape[2]):
        weights = k_features[:, :, : i + 1] @ q_features[:, :, i, :, None]
        outputs.append((weights * v[:, :, : i + 1]).sum(2) / weights.sum(2))
    return torch.stack(outputs, dim=2)


def orthogonal_directions(heads: int, features: int, channels: int) -> Directions:
    """Draw normal vectors, orthogonal in groups of `channels` (paper, section 3.2)."""
    blocks = -(-features // channels)
    basis, triangle = torch.linalg.qr(torch.randn(heads, blocks, channels, channels))
    # QR gives uniform orthogonal matrices only after its signs are fixed (arXiv math-ph/0609050).
    basis = basis * triangle.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]
    lengths = torch.randn(heads, features, channels).norm(dim=-1, keepdim=True)
    return basis.mT.flatten(1, 2)[:, :features] * lengths
