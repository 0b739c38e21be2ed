"""Causal attention: out_i = sum_{j <= i} softmax_j(scale <q_i, k_j> + bias_ij) v_j. The bias is that of ALiBi, or zero."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from cat.ops.position import alibi_bias
from cat.types import Heads, Positions, Queries, Values

QUERY_CHUNK = 256
"""Queries per call with a bias. A chunk attends to the keys up to its last query: with a bias, PyTorch's kernel skips no keys."""


def attend(
    q: Queries,
    k: Heads,
    v: Values,
    *,
    scale: float,
    alibi: bool = False,
    positions: Positions | None = None,
    valid: Bool[Tensor, "B L"] | None = None,
) -> Float[Tensor, "B H _ E"]:
    """Compute dense causal attention. With `positions`, `q` holds only the queries at these positions.

    `valid`: see `attend_last`; not with `positions`.
    """
    length = k.shape[2]
    if positions is not None:
        visible = torch.arange(length, device=k.device) <= positions[:, None, :, None]
        mask = alibi_bias(q.shape[1], positions, length, q).transpose(0, 1) if alibi else visible
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    if not alibi and valid is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    if not alibi:
        return attend_last(q, k, v, scale=scale, valid=valid)
    ends = [min(start + QUERY_CHUNK, length) for start in range(0, length, QUERY_CHUNK)]
    chunks = zip(q.split(QUERY_CHUNK, dim=2), ends, strict=True)
    return torch.cat(
        [
            attend_last(
                queries, k[:, :, :end], v[:, :, :end], scale=scale, alibi=True, valid=None if valid is None else valid[:, :end]
            )
            for queries, end in chunks
        ],
        dim=2,
    )


def attend_last(
    q: Float[Tensor, "B H A C"],
    k: Heads,
    v: Values,
    *,
    scale: float,
    alibi: bool = False,
    valid: Bool[Tensor, "B L"] | None = None,
) -> Float[Tensor, "B H A E"]:
    """Compute dense causal attention of the last A tokens, whose queries are `q`.

    `valid` are the keys that exist. A token that does not exist attends to itself only, because a softmax needs a key.
    """
    queries, length = q.shape[2], k.shape[2]
    mask = None
    if alibi:
        mask = alibi_bias(q.shape[1], torch.arange(length - queries, length, device=k.device), length, q)
    elif queries > 1:
        mask = torch.ones(queries, length, dtype=torch.bool, device=k.device).tril(length - queries)
    if valid is not None:
        own = torch.arange(length - queries, length, device=k.device)[:, None] == torch.arange(length, device=k.device)
        exists = valid[:, None, None] | own
        mask = exists if mask is None else mask & exists if mask.dtype == torch.bool else mask.masked_fill(~exists, float("-inf"))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def logits(q: Heads, k: Heads, *, scale: float, alibi: bool = False) -> Float[Tensor, "B H L L"]:
    """Return the input of the softmax, with -inf above the diagonal."""
    scores = scale * q @ k.mT
    if alibi:
        return scores + alibi_bias(q.shape[1], torch.arange(q.shape[2], device=q.device), q.shape[2], q)
    return scores.masked_fill(torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1), float("-inf"))


def naive_attend(
    q: Queries, k: Heads, v: Values, *, scale: float, alibi: bool = False, positions: Positions | None = None
) -> Float[Tensor, "B H _ E"]:
    """Reference implementation of `attend`: one query at a time."""
    positions = torch.arange(q.shape[2]).expand(len(q), -1) if positions is None else positions
    outputs = []
    for b, sequence in enumerate(positions.tolist()):
        for a, i in enumerate(sequence):
            scores = scale * (k[b, :, : i + 1] @ q[b, :, a, :, None])[..., 0]
            if alibi:
                slope = 2.0 ** (-8 * torch.arange(1, q.shape[1] + 1).to(q) / q.shape[1])
                scores = scores - slope[:, None] * torch.arange(i, -1, -1, device=q.device)
            weights = torch.exp(scores - scores.amax(-1, keepdim=True))
            weights = weights / weights.sum(-1, keepdim=True)
            outputs.append((weights[..., None] * v[b, :, : i + 1]).sum(1))
    return torch.stack(outputs).unflatten(0, positions.shape).transpose(1, 2)
