"""Causal attention: out_i = sum_{j <= i} softmax_j(scale <q_i, k_j> + bias_ij) v_j."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from cat.position import take
from cat.types import Asked, Heads, Values


def attend(
    q: Heads, k: Heads, v: Values, *, scale: float, bias: Float[Tensor, "H L L"] | None = None, at: Asked | None = None
) -> Float[Tensor, "B H _ E"]:
    """Dense causal attention, or its rows at positions `at`.

    A `bias` holds -inf above the diagonal; without one the mask is the causal one.
    """
    if at is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=bias is None, scale=scale)
    seen = torch.arange(k.shape[2], device=k.device) <= at[:, None, :, None]
    mask = seen if bias is None else bias[:, at].transpose(0, 1)
    return F.scaled_dot_product_attention(take(q, at), k, v, attn_mask=mask, scale=scale)


def logits(q: Heads, k: Heads, *, scale: float, bias: Float[Tensor, "H L L"] | None = None) -> Float[Tensor, "B H L L"]:
    """What the softmax is taken of, -inf above the diagonal."""
    scores = scale * q @ k.mT
    if bias is not None:
        return scores + bias
    return scores.masked_fill(torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1), float("-inf"))


def attend_last(
    q: Float[Tensor, "B H A C"], k: Heads, v: Values, *, scale: float, bias: Float[Tensor, "H A L"] | None = None
) -> Float[Tensor, "B H A E"]:
    """Dense causal attention of the last A tokens alone: their queries, and their rows of a `bias`."""
    mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=k.device).tril(k.shape[2] - q.shape[2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask if bias is None else bias, scale=scale)


def naive_attend(
    q: Heads, k: Heads, v: Values, *, scale: float, bias: Float[Tensor, "H L L"] | None = None, at: Asked | None = None
) -> Float[Tensor, "B H _ E"]:
    """The definition, one query at a time; the twin that `attend` is tested against."""
    outputs = []
    for i in range(q.shape[2]):
        scores = scale * (k[:, :, : i + 1] @ q[:, :, i, :, None])[..., 0]
        if bias is not None:
            scores = scores + bias[:, i, : i + 1]
        weights = torch.exp(scores - scores.amax(-1, keepdim=True))
        weights = weights / weights.sum(-1, keepdim=True)
        outputs.append((weights[..., None] * v[:, :, : i + 1]).sum(2))
    return take(torch.stack(outputs, dim=2), at)
