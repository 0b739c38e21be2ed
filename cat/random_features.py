"""Performer: softmax attention with positive orthogonal random features of exp (FAVOR+, arXiv 2009.14794, lemma 1):

    out_i = sum_{j <= i} <phi(q_i), phi(k_j)> v_j / sum_{j <= i} <phi(q_i), phi(k_j)>
    phi(x)_m = exp(<w_m, y> - |y|^2 / 2) / sqrt(M)    y = sqrt(scale) x

The mean of <phi(q), phi(k)> over normal directions w is exp(scale <q, k>).
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from cat.linear_attention import causal_sum
from cat.types import Heads, Values

LARGEST = 50.0
"""The logarithm of the largest feature that a key can have: float32 holds e^88, and there are sums of them to come."""
SMALLEST = 1e-30
"""What the weights of a query add up to at least, as far above the smallest float32 as its gradients need."""

Directions = Float[Tensor, "H M C"]


def performer_attend(q: Heads, k: Heads, v: Values, *, scale: float, directions: Directions) -> Values:
    """Attention by random features, at a cost of L (chunk + C) M a head.

    A factor of all weights of a query cancels out: the largest feature of a query is made 1, and what the largest feature of
    any key could be, which is e^(|w|^2 / 2) by completing the square, is made e^LARGEST. So no key depends on later ones.
    """
    dtype = v.dtype
    with torch.autocast(q.device.type, enabled=False):
        q, k, v = (x.to(directions.dtype) for x in (q, k, v))
        q, k = math.sqrt(scale) * q, math.sqrt(scale) * k
        q_logs, k_logs = q @ directions.mT, k @ directions.mT
        q_features = torch.exp(q_logs - q_logs.detach().amax(-1, keepdim=True))
        bound = directions.square().sum(-1).amax() / 2
        k_features = torch.exp(k_logs - (k.square().sum(-1, keepdim=True) / 2 + bound - LARGEST))
        # A last channel of ones adds up the weights.
        sums = causal_sum(q_features, k_features, F.pad(v, (0, 1), value=1))
    return (sums[..., :-1] / sums[..., -1:].clamp(min=SMALLEST)).to(dtype)


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
