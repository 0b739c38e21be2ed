"""Performer: softmax attention with positive orthogonal random features of exp (FAVOR+, arXiv 2009.14794, lemma 1):

    out_i = sum_{j <= i} <phi(q_i), phi(k_j)> v_j / sum_{j <= i} <phi(q_i), phi(k_j)>
    phi(x)_m = exp(<w_m, y> - |y|^2 / 2) / sqrt(M)    y = sqrt(scale) x

The mean of <phi(q), phi(k)> over normal directions w is exp(scale <q, k>).
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from cat.ops.common import to_float32, without_autocast
from cat.types import Heads, Values

CHUNK = 64
"""Tokens between two states."""
SMALLEST = 1e-30
"""What the weights of a query add up to at least, as far above the smallest float32 as its gradients need."""

Directions = Float[Tensor, "H M C"]
Features = Float[Tensor, "B H L M"]
Logs = Float[Tensor, "B H _ 1"]


def performer_attend(q: Heads, k: Heads, v: Values, *, scale: float, directions: Directions) -> Values:
    """Attention by random features, at a cost of L (chunk + C) M a head, in float32 at least.

    A factor of all weights of a query cancels out: the largest feature of a query is made 1, and so is the largest one of all
    keys up to it. So no key depends on later ones, and nothing overflows float32, however wide a head and long a row. Rows may be
    so long that no key has any size in the features that are large for a query: weights below SMALLEST add up to less than one.
    """
    return performer_attend_next(q, k, v, state=None, scale=scale, directions=directions)[0]


class Sums(NamedTuple):
    """What attention by random features needs of the tokens so far, however many they are."""

    highest: Logs
    """The logarithm of the largest feature of a key."""
    products: Float[Tensor, "B H M E"]
    """Of the features, divided by the largest, and the value; the last of E channels is that of ones."""


def performer_attend_next(
    q: Heads, k: Heads, v: Values, *, state: Sums | None, scale: float, directions: Directions
) -> tuple[Values, Sums]:
    """The outputs of tokens that follow upon those of `state`, None before the first one; and the sums of all of them."""
    with without_autocast(q):
        # A last channel of ones adds up the weights.
        q, k, ones, directions = map(to_float32, (q, k, F.pad(v, (0, 1), value=1), directions))
        q_logs, k_logs = (math.sqrt(scale) * x @ directions.mT for x in (q, k))
        k_logs = k_logs - scale * k.square().sum(-1, keepdim=True) / 2
        peak = k_logs.detach().amax(-1, keepdim=True)
        q_features = torch.exp(q_logs - q_logs.detach().amax(-1, keepdim=True))
        step, sums = _causal_sum(q_features, torch.exp(k_logs - peak), ones, peak, state)
    return (step[..., :-1] / step[..., -1:].clamp(min=SMALLEST)).to(v.dtype), sums


def _causal_sum(q: Features, k: Features, v: Values, peak: Logs, sums: Sums | None) -> tuple[Values, Sums]:
    """sum_{j <= i} e^(peak_j - highest_i) <q_i, k_j> v_j, where highest_i is the largest peak up to i: no factor is above 1."""
    if sums is None:
        none = peak.new_full((*peak.shape[:2], 1, 1), float("-inf"))
        sums = Sums(none, q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1]))
    before, state = sums
    length = q.shape[2]
    chunk = min(CHUNK, length)
    q, k, v = (F.pad(x, (0, 0, 0, -length % chunk)).unflatten(2, (-1, chunk)) for x in (q, k, v))
    peak = F.pad(peak, (0, 0, 0, -length % chunk), value=float("-inf"))  # of a place that no token takes
    highest = torch.maximum(peak.cummax(2).values, before).unflatten(2, (-1, chunk))
    peak = peak.unflatten(2, (-1, chunk))
    future = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).triu(1)
    factor = (peak.mT - highest).exp().masked_fill(future, 0)
    end = highest[:, :, :, -1:]
    start = torch.cat([before[:, :, None], end[:, :, :-1]], dim=2)
    states = []
    for kept, added in zip((start - end).exp().unbind(2), ((k * (peak - end).exp()).mT @ v).unbind(2), strict=True):
        states.append(state)
        state = kept * state + added
    step = (q @ k.mT * factor) @ v + (start - highest).exp() * (q @ torch.stack(states, dim=2))
    return step.flatten(2, 3)[:, :, :length], Sums(end[:, :, -1], state)


def naive_performer_attend(q: Heads, k: Heads, v: Values, *, scale: float, directions: Directions) -> Values:
    """The definition, one query at a time; the twin that `performer_attend` is tested against."""
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
    """Normal vectors, orthogonal to each other within each `channels` of a head (section 3.2 of the paper)."""
    blocks = -(-features // channels)
    basis, triangle = torch.linalg.qr(torch.randn(heads, blocks, channels, channels))
    # Uniform among the orthogonal matrices only with signs that do not depend on the algorithm (arXiv math-ph/0609050).
    basis = basis * triangle.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]
    lengths = torch.randn(heads, features, channels).norm(dim=-1, keepdim=True)
    return basis.mT.flatten(1, 2)[:, :features] * lengths
