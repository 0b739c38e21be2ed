"""Multi-token attention: softmax attention whose logits are convolved (arXiv 2504.00927):

    s_ij = scale <q_i, k_j>                                   for 0 <= j <= i, else 0
    a_ij = sum_{m < M} sum_{|n| <= U/2} F_mn s_{i-m, j-n}       one kernel F per head
    w_i  = softmax_{j <= i} a_ij                              out_i = sum_{j <= i} w_ij v_j

Then w may be mixed between the heads of a group. Logits of masked pairs of tokens are zero before the convolution, so that a_ij
depends on no token after i, and -inf after it.

Queries are computed in tiles of `TILE`. For each lag n, the sum over m is the product of a banded matrix and the logits of a
tile. PyTorch's depthwise convolution takes ten times as long on a CPU (both passes, 32 sequences of 128 tokens).

Memory is linear in the length: logits exist for `ROWS` queries at a time, and the backward pass computes them again. Both
passes over 4,096 tokens with 4 heads of 16 channels take 0.25 GB; with all queries at once, they take 1.7 GB and 5 times as
long. Under torch.compile, all queries are computed at once.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from cat.ops.common import Operation, autocast_to_compute_dtype, chunk_size, to_float32, without_autocast
from cat.ops.position import gather_positions
from cat.types import Heads, Positions, Values

TILE = 16
"""Queries per tile. Tiles of 8 or 32 take up to 1.6 times as long."""
ROWS = 128
"""Queries whose logits are in memory at a time; those that a tile shares with the tile before it count twice."""

LogitKernel = Float[Tensor, "H M U"]
HeadMixing = Float[Tensor, "_ g g"]
"""Weights from every head to every head of a group."""
Rows = Float[Tensor, "B H N R C"]
"""Queries of each tile, with the M - 1 queries before it. Zeros stand in for those before the first token."""
RowIndex = Int[Tensor, "#B N R"]
"""Token of each query; negative before the first token."""


def multi_token_attend(
    q: Float[Tensor, "B H _ C"],
    k: Heads,
    v: Values,
    kernel: LogitKernel,
    mixing: HeadMixing | None = None,
    *,
    scale: float,
    positions: Positions | None = None,
    before: Float[Tensor, "B H _ C"] | None = None,
    padding: Int[Tensor, " B"] | None = None,
) -> Float[Tensor, "B H _ E"]:
    """Compute multi-token attention of the last tokens, whose queries are `q`, or of those at `positions` if q has all tokens.

    `before` are the queries immediately before q, as many as the kernel needs or as exist. `padding` is the number of the first
    tokens of each sequence that no other token sees. `mixing` mixes the weights of heads.
    """
    q, k, v = (autocast_to_compute_dtype(x) for x in (q, k, v))
    reach, length = kernel.shape[1] - 1, k.shape[2]
    if positions is not None and positions.shape[1] * (reach + 1) > length:
        every = multi_token_attend(q, k, v, kernel, mixing, scale=scale, before=before, padding=padding)
        return gather_positions(every, positions)
    if positions is None:
        rows, index = _tiles(q, before, reach=reach, length=length)
    else:
        index = positions[..., None] + torch.arange(-reach, 1, device=q.device)
        rows = gather_positions(q, index.clamp(min=0).flatten(1)).unflatten(2, index.shape[1:])
    count, size = rows.shape[2], rows.shape[3] - reach
    per_block = count if torch.compiler.is_compiling() else max(1, ROWS // rows.shape[3])
    outputs = []
    for tile in range(0, max(count, 1), per_block):
        tiles = slice(tile, tile + per_block)
        # No query of a block sees the keys after its last token.
        end = length if positions is not None else min(length, length - q.shape[2] + (tile + per_block) * size)
        outputs.append(
            _AttendTiles.call(rows[:, :, tiles], k[:, :, :end], v[:, :, :end], kernel, mixing, index[:, tiles], padding, scale)
        )
    return torch.cat(outputs, dim=2)[:, :, : q.shape[2] if positions is None else count]


def multi_token_logits(q: Heads, k: Heads, kernel: LogitKernel, *, scale: float) -> Float[Tensor, "B H L L"]:
    """Return the input of the softmax, -inf for tokens that are not visible."""
    rows, index = _tiles(q, None, reach=kernel.shape[1] - 1, length=k.shape[2])
    return _tile_logits(rows, k, kernel, index, None, scale).flatten(2, 3)[:, :, : q.shape[2]]


def naive_multi_token_attend(
    q: Float[Tensor, "B H _ C"],
    k: Heads,
    v: Values,
    kernel: LogitKernel,
    mixing: HeadMixing | None = None,
    *,
    scale: float,
    positions: Positions | None = None,
    before: Float[Tensor, "B H _ C"] | None = None,
    padding: Int[Tensor, " B"] | None = None,
) -> Float[Tensor, "B H _ E"]:
    """Reference implementation of `multi_token_attend`: one logit at a time, of all heads."""
    (batch, heads, length), (_, queries, keys) = k.shape[:3], kernel.shape
    first, half = length - q.shape[2], keys // 2
    q = q if before is None else torch.cat([before, q], dim=2)
    q = F.pad(q, (0, 0, length - q.shape[2], 0))
    groups = torch.eye(heads).to(q) if mixing is None else torch.block_diag(*mixing)
    sequences = []
    for b in range(batch):
        start = 0 if padding is None else int(padding[b])
        scores = (scale * q[b] @ k[b].mT).tril()
        scores[:, :start], scores[:, :, :start] = 0, 0
        scores = F.pad(scores, (half, half, queries - 1, 0))
        outputs = []
        for i in range(first, length):
            visible = [j for j in range(i + 1) if j >= start or j == i]
            logits = [(scores[:, i : i + queries, j : j + keys] * kernel.flip(1, 2)).sum((1, 2)) for j in visible]
            weights = groups @ torch.stack(logits, dim=1).softmax(1)
            outputs.append((weights[..., None] * v[b][:, visible]).sum(1))
        sequences.append(torch.stack(outputs, dim=1))
    return gather_positions(torch.stack(sequences), positions)


class _AttendTiles(Operation):
    """Attention of some tiles to some keys. The backward pass computes the logits again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        rows: Rows,
        k: Heads,
        v: Values,
        kernel: LogitKernel,
        mixing: HeadMixing | None,
        index: RowIndex,
        padding: Int[Tensor, " B"] | None,
        scale: float,
    ) -> Float[Tensor, "B H _ E"]:
        with without_autocast(rows):
            weights = _tile_logits(rows, k, kernel, index, padding, scale).flatten(2, 3).softmax(-1)
            if mixing is not None:
                grouped = weights.unflatten(1, mixing.shape[:2])
                weights = (mixing.to(weights.dtype) @ grouped.flatten(3)).view_as(grouped).flatten(1, 2)
            return weights.to(v.dtype) @ v

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.scale = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, mixing, index, padding = ctx.saved_tensors
        inputs += [] if mixing is None else [mixing]

        def attend(rows: Tensor, k: Tensor, v: Tensor, kernel: Tensor, mixing: Tensor | None = None) -> Tensor:
            return _AttendTiles.forward(rows, k, v, kernel, mixing, index, padding, ctx.scale)

        gradients = torch.func.vjp(attend, *inputs)[1](gradient)
        return *gradients, *[None] * (8 - len(gradients))


class _Convolve(Operation):
    """Sum of the products of the matrix of each lag with the scores, which have U - 1 more keys than the result."""

    generate_vmap_rule = True

    @staticmethod
    def forward(scores: Float[Tensor, "B H N R _"], matrices: Float[Tensor, "U H 1 Q R"]) -> Float[Tensor, "B H N Q K"]:
        length = scores.shape[-1] - len(matrices) + 1
        logits = matrices[0] @ scores[..., :length]
        for lag, matrix in enumerate(matrices[1:], 1):
            logits += matrix @ scores[..., lag : lag + length]
        return logits

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Add to the same tensor at every lag; PyTorch's gradient of a slice is a copy with all keys."""
        scores, matrices = ctx.saved_tensors
        length = gradient.shape[-1]
        to_scores = F.pad(matrices[0].mT @ gradient, (0, len(matrices) - 1))
        for lag, matrix in enumerate(matrices[1:], 1):
            to_scores[..., lag : lag + length] += matrix.mT @ gradient
        products = (gradient @ scores[..., lag : lag + length].mT for lag in range(len(matrices)))
        return to_scores, torch.stack([product.sum((0, 2))[:, None] for product in products])


def _tiles(q: Float[Tensor, "B H A C"], before: Tensor | None, *, reach: int, length: int) -> tuple[Rows, RowIndex]:
    """Return the queries of the last A of `length` tokens in tiles; zeros follow the last token."""
    count = q.shape[2]
    size = chunk_size(count, TILE)
    q = q if before is None else torch.cat([before, q], dim=2)
    missing = -count % size
    rows = F.pad(q, (0, 0, reach + count - q.shape[2], missing)).unfold(2, reach + size, size).mT
    index = torch.arange(length - count - reach, length + missing, device=q.device).unfold(0, reach + size, size)
    return rows, index[None]


def _tile_logits(
    rows: Rows, k: Heads, kernel: LogitKernel, index: RowIndex, padding: Int[Tensor, " B"] | None, scale: float
) -> Float[Tensor, "B H N Q K"]:
    """Return the convolved logits of each tile in at least float32, -inf for tokens that are not visible."""
    reach, half, length = kernel.shape[1] - 1, kernel.shape[2] // 2, k.shape[2]
    scores = to_float32((scale * rows).flatten(2, 3) @ k.mT).unflatten(2, rows.shape[2:4])
    visible, own = _visible(index[:, None, ..., None], length, padding)
    scores = F.pad(scores.masked_fill(~visible, 0), (half, half))
    matrices = _banded(kernel.to(scores.dtype), rows.shape[3] - reach)
    logits: Tensor = _Convolve.call(scores, matrices)
    return logits.masked_fill(~(visible | own)[..., reach:, :], float("-inf"))


def _visible(query: Int[Tensor, "#B 1 N R 1"], length: int, padding: Int[Tensor, " B"] | None) -> tuple[Tensor, Tensor]:
    """Return which keys each query sees, and which key is of its own token: a query that is padding sees only itself."""
    keys = torch.arange(length, device=query.device)
    visible: Bool[Tensor, "#B 1 N R K"] = keys <= query
    if padding is not None:
        visible = visible & (keys >= padding[:, None, None, None, None])
    return visible, keys == query


def _banded(kernel: LogitKernel, size: int) -> Float[Tensor, "U H 1 {size} R"]:
    """Return, for each lag of the keys, the matrix from the queries of a tile and those before it to the tile's queries.

    Row i has the kernel from column i on. The rows follow each other in memory, one column further each.
    """
    rows = size + kernel.shape[1] - 1
    reversed_kernel = kernel.flip(1, 2).permute(2, 0, 1)
    row = F.pad(reversed_kernel, (0, size))[:, :, None]
    return row.expand(-1, -1, size, -1).flatten(2)[..., : size * rows].unflatten(2, (1, size, rows))
