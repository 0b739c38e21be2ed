"""Causal attention: out_i = sum_j softmax_j(scale <q_i, k_j> + b(i - j)) v_j over the visible tokens j.

Token j is visible to query i if 0 <= i - j < window. The bias b(d) is -slope d for ALiBi, and else zero. If there are fewer
heads of keys than of queries, consecutive heads of queries share one (grouped queries, arXiv 2305.13245).
"""

from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from cat.ops.common import is_mapped
from cat.types import KeyHeads, Positions, Queries, Valid, ValueHeads

PARTS, MIN_PART = 16, 64
"""Number of parts of the queries if there is a bias, and minimum queries per part. A part attends to the keys up to its last
query, because PyTorch's kernel skips no keys then. At 8,192 tokens, 16 parts take 0.6 times the time of one."""
TILE = 64
"""Queries per tile if there is no gradient: scores of 64 queries and 4,096 keys fill half of the cache of a core. With 896
queries of 4,096 keys, PyTorch's kernel with its mask takes 1.6 times as long, and tiles of 32 queries 1.1 times. With 112 queries
of 512 keys, the kernel takes no longer."""

Slopes = Float[Tensor, " H"]


def attend(
    q: Queries,
    k: KeyHeads,
    v: ValueHeads,
    *,
    scale: float,
    slopes: Slopes | None = None,
    positions: Positions | None = None,
    window: int | None = None,
    valid: Valid | None = None,
    dropout: float = 0.0,
) -> Float[Tensor, "B H _ E"]:
    """Compute dense causal attention. With `positions`, `q` holds only the queries at these positions.

    `slopes` are those of ALiBi. `window` is the number of tokens that a query sees, its own included. Keys that are not `valid`
    are seen by no other token. Attention weights are dropped with probability `dropout`.

    On a CPU, memory is linear in the length if there are no `positions` and no `valid`, and if no weights are dropped. On a GPU,
    the bias is copied to memory: quadratic in the length for ALiBi, or in `window`.
    """
    if positions is not None:
        if window is None and valid is None and _uses_tiles(q, dropout):
            return _attend_in_tiles(q, k, v, positions, scale=scale, slopes=slopes)
        mask = _mask(positions, k.shape[2], q, slopes=slopes, window=window, valid=valid)
        return _attend(q, k, v, mask, scale=scale, dropout=dropout)
    if valid is not None:
        last = partial(attend_last, scale=scale, slopes=slopes, window=window, dropout=dropout)
        parts = [last(q[:, :, a:b], k[:, :, :b], v[:, :, :b], valid=valid[:, :b]) for a, b in _parts(q.shape[2])]
        return torch.cat(parts, dim=2)
    if slopes is None and window is None:
        return _attend(q, k, v, scale=scale, dropout=dropout, causal=True)
    # An exported program has one path for all lengths.
    if window is not None and not torch.compiler.is_exporting() and k.shape[2] > max(window, MIN_PART):
        return _attend_in_blocks(q, k, v, slopes=slopes, window=window, scale=scale, dropout=dropout)
    relative = partial(_attend_relative, slopes=slopes, window=window, scale=scale, dropout=dropout)
    return torch.cat([relative(q[:, :, a:b], k[:, :, :b], v[:, :, :b]) for a, b in _parts(q.shape[2])], dim=2)


def attend_last(
    q: Float[Tensor, "B H A C"],
    k: KeyHeads,
    v: ValueHeads,
    *,
    scale: float,
    slopes: Slopes | None = None,
    window: int | None = None,
    valid: Valid | None = None,
    dropout: float = 0.0,
) -> Float[Tensor, "B H A E"]:
    """Compute dense causal attention of the last A tokens, whose queries are `q`."""
    queries, length = q.shape[2], k.shape[2]
    mask = None
    if queries > 1 or slopes is not None or valid is not None or (window is not None and window < length):
        positions = torch.arange(length - queries, length, device=k.device)[None]
        mask = _mask(positions, length, q, slopes=slopes, window=window, valid=valid)
    return _attend(q, k, v, mask, scale=scale, dropout=dropout)


def logits(
    q: Queries, k: KeyHeads, *, scale: float, slopes: Slopes | None = None, window: int | None = None
) -> Float[Tensor, "B H L L"]:
    """Return the input of the softmax, with -inf for tokens that are not visible."""
    scores = scale * q @ repeat_heads(k, q.shape[1]).mT
    mask = _mask(torch.arange(q.shape[2], device=q.device)[None], q.shape[2], q, slopes=slopes, window=window)
    return scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask


def naive_attend(
    q: Queries,
    k: KeyHeads,
    v: ValueHeads,
    *,
    scale: float,
    slopes: Slopes | None = None,
    positions: Positions | None = None,
    window: int | None = None,
    valid: Valid | None = None,
    dropout: float = 0.0,
) -> Float[Tensor, "B H _ E"]:
    """Reference implementation of `attend`: one query at a time."""
    k, v = (repeat_heads(x, q.shape[1]) for x in (k, v))
    positions = torch.arange(q.shape[2]).expand(len(q), -1) if positions is None else positions
    outputs = []
    for b, sequence in enumerate(positions.tolist()):
        for a, i in enumerate(sequence):
            start = 0 if window is None else max(0, i - window + 1)
            visible = [j for j in range(start, i + 1) if j == i or valid is None or valid[b, j]]
            scores = scale * (k[b, :, visible] @ q[b, :, a, :, None])[..., 0]
            if slopes is not None:
                scores = scores - slopes.to(q)[:, None] * (i - torch.tensor(visible, device=q.device))
            weights = torch.exp(scores - scores.amax(-1, keepdim=True))
            weights = F.dropout(weights / weights.sum(-1, keepdim=True), dropout)
            outputs.append((weights[..., None] * v[b, :, visible]).sum(1))
    return torch.stack(outputs).unflatten(0, positions.shape).transpose(1, 2)


def repeat_heads(x: Shaped[Tensor, "B K *token"], heads: int) -> Shaped[Tensor, "B H *token"]:
    """Repeat each head of keys or values for the `heads` / K heads of queries that share it."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def relative_bias(
    distance: Int[Tensor, " N"], like: Tensor, *, slopes: Slopes | None = None, window: int | None = None
) -> Float[Tensor, "#H N"]:
    """Return the bias b(d) of each distance d = i - j, -inf if token j is not visible.

    `like` gives the dtype and the device.
    """
    bias = torch.zeros_like(distance, dtype=torch.float64)[None] if slopes is None else -slopes.double()[:, None] * distance
    hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
    return bias.masked_fill(hidden, float("-inf")).to(like.dtype)


def _attend_relative(
    q: Float[Tensor, "B H A C"],
    k: KeyHeads,
    v: ValueHeads,
    *,
    slopes: Slopes | None,
    window: int | None,
    scale: float,
    dropout: float,
) -> Float[Tensor, "B H A E"]:
    """Compute attention of the last A tokens, without a bias in memory.

    If queries are in reverse order, query r and key j are K - 1 - (r + j) tokens apart. All rows of the bias are then windows of
    one vector.
    """
    queries, length = q.shape[2], k.shape[2]
    distance = torch.arange(length - 1, -queries, -1, device=q.device)
    mask = _windows(relative_bias(distance, q, slopes=slopes, window=window), length)[None]
    if q.device.type != "cpu":
        mask = mask.contiguous()  # the kernels of a GPU read aligned rows only
    return _attend(q.flip(2), k, v, mask, scale=scale, dropout=dropout).flip(2)


def _attend_in_blocks(
    q: Float[Tensor, "B H L C"],
    k: KeyHeads,
    v: ValueHeads,
    *,
    slopes: Slopes | None,
    window: int,
    scale: float,
    dropout: float,
) -> Float[Tensor, "B H L E"]:
    """Compute attention of blocks of queries to their own tokens and the `window` - 1 before them.

    The first block has no tokens before it. The others become the batch of one call.
    """
    size, length = max(window, MIN_PART), q.shape[2]
    count, start = -(-(length - size) // size), size - window + 1
    relative = partial(_attend_relative, slopes=slopes, window=window, scale=scale, dropout=dropout)
    first = relative(*(x[:, :, :size] for x in (q, k, v)))
    keys, values = (_blocks(x, start, size=size, reach=window - 1, count=count) for x in (k, v))
    others = relative(_blocks(q, size, size=size, reach=0, count=count), keys, values)
    others = others.unflatten(0, (len(q), count)).transpose(1, 2).flatten(2, 3)
    return torch.cat([first, others[:, :, : length - size]], dim=2)


def _uses_tiles(q: Queries, dropout: float) -> bool:
    """Whether the outputs of many queries are computed in tiles: on a CPU without a gradient, as in an evaluation."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or is_mapped(q) or dropout:
        return False
    return q.shape[2] > 2 * TILE and q.device.type == "cpu" and q.dtype in (torch.float32, torch.float64)


def _attend_in_tiles(
    q: Float[Tensor, "B H A C"], k: KeyHeads, v: ValueHeads, positions: Positions, *, scale: float, slopes: Slopes | None
) -> Float[Tensor, "B H A E"]:
    """Compute attention of the queries at `positions`: `TILE` queries at a time attend to the keys up to the last of them.

    Positions should rise: otherwise a tile has more keys than needed.
    """
    q, k, v = scale * q, repeat_heads(k, q.shape[1]).mT.contiguous(), repeat_heads(v, q.shape[1])
    out = q.new_empty(*q.shape[:3], v.shape[3])
    for tile in torch.arange(q.shape[2], device=q.device).split(TILE):
        rows = slice(int(tile[0]), int(tile[-1]) + 1)
        for b, tokens in enumerate(positions[:, rows]):
            first, last = tokens.aminmax()
            seen, end = int(first) + 1, int(last) + 1
            scores = q[b, :, rows] @ k[b, :, :, :end]
            keys = torch.arange(end, device=q.device)
            if slopes is not None:
                scores.addcmul_((keys - tokens[:, None]).to(q.dtype), slopes.to(q.dtype)[:, None, None])
            # Every query sees the keys up to the first one.
            scores[:, :, seen:].masked_fill_(keys[seen:] > tokens[:, None], float("-inf"))
            out[b, :, rows] = scores.softmax(-1) @ v[b, :, :end]
    return out


def _attend(
    q: Queries, k: KeyHeads, v: ValueHeads, mask: Tensor | None = None, *, scale: float, dropout: float, causal: bool = False
) -> Float[Tensor, "B H _ E"]:
    # A comparison of symbolic sizes is no bool.
    grouped = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scale, **grouped)


def _mask(
    positions: Int[Tensor, "#B A"],
    length: int,
    like: Tensor,
    *,
    slopes: Slopes | None = None,
    window: int | None = None,
    valid: Valid | None = None,
) -> Bool[Tensor, "#B 1 A L"] | Float[Tensor, "#B H A L"]:
    """Return which of `length` keys each query sees, or the bias with -inf for the others if there are `slopes`.

    Every query sees its own token, so that no sum of weights is zero.
    """
    queries, keys = positions[:, None, :, None], torch.arange(length, device=positions.device)
    visible = keys <= queries
    if window is not None:
        visible = visible & (keys > queries - window)
    if valid is not None:
        visible = visible & valid[:, None, None] | (keys == queries)
    if slopes is None:
        return visible
    bias = relative_bias(torch.arange(length - 1, -length, -1, device=positions.device), like, slopes=slopes)
    return _windows(bias, length)[:, length - 1 - positions].transpose(0, 1).masked_fill(~visible, float("-inf"))


def _windows(x: Float[Tensor, "H N"], size: int) -> Float[Tensor, "H _ {size}"]:
    """Return a view of all windows of `size` neighbouring values. Unlike `unfold`, it can be exported for any `size`."""
    return x.as_strided((x.shape[0], x.shape[1] - size + 1, size), (x.shape[1], 1, 1))


def _parts(length: int) -> list[tuple[int, int]]:
    """Return the first token and the end of each part of the queries.

    A compiled program has one part, because it cannot loop over a length.
    """
    count = 1 if torch.compiler.is_compiling() else max(1, min(PARTS, length // MIN_PART))
    return [(length * part // count, length * (part + 1) // count) for part in range(count)]


def _blocks(x: Shaped[Tensor, "B K L C"], start: int, *, size: int, reach: int, count: int) -> Shaped[Tensor, "batch K _ C"]:
    """Split the tokens from `start` on into `count` blocks of `reach` + `size`, each the batch of a sequence of its own.

    A block begins `size` tokens after the one before it. Zeros follow the last token.
    """
    missing = start + reach + size * count - x.shape[2]
    blocks = F.pad(x[:, :, start:], (0, 0, 0, missing)).unfold(2, reach + size, size)
    return blocks.permute(0, 2, 1, 4, 3).flatten(0, 1)
