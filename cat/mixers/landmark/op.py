"""Landmark attention: softmax attention to the own block and `top` earlier ones:

    landmark_n = s at the last token of block n     (arXiv 2407.05591, figure 3: a long convolution on k summarizes the block)
    chosen_i   = the `top` largest <q_i, landmark_n> over the blocks n that end before the block of i begins
    weight_ij  ~ exp <q_i, k_j>                                              token j <= i of the own block
               ~ exp <q_i, landmark_n> softmax_{j in n} <q_i, k_j>           token j of a chosen block n

The choice is hard. The landmark's score also decides how much attention its block gets: this is the grouped softmax of landmark
attention (arXiv 2305.16300, section 3.1), and it gives landmarks their gradient. A query that attends to every earlier block has
no choice, and all its weights are exp <q_i, k_j>: dense attention. With `grouped`, it has the weights of chosen blocks there too,
as in the training of that paper, which attends to all blocks.

A landmark is a sum over the tokens of its block. It shows which tokens the block has, but not which are adjacent. A key of two
tokens matches all blocks with both tokens, so if there are many such blocks, `top` must be larger than for keys of one token.

Convolutions carry information over the end of a block. A chosen block is therefore extended by the next `reach` tokens. A token
that is in two chosen blocks counts once.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from cat.ops.attention import attend
from cat.ops.common import Operation, in_chunks
from cat.types import Heads, Positions, Queries, Values

Landmarks = Float[Tensor, "B H N C"]
Chosen = Int[Tensor, "B H A T"]
Own = Int[Tensor, "#B A"]
"""Index of the block of each query."""
DENSE_RATIO = {"all": 3, "positions": 8}
"""Maximum ratio of windows to chosen windows for which every query is multiplied with all windows in one large product. Above it,
queries are sorted by window. For `all` queries of a sequence, or only for those at given `positions`."""


def landmark_attend(
    q: Queries,
    k: Heads,
    v: Values,
    s: Landmarks,
    *,
    scale: float,
    block: int,
    top: int,
    reach: int,
    grouped: bool = False,
    positions: Positions | None = None,
) -> Float[Tensor, "B H _ E"]:
    """Compute landmark attention; costs A (L / block + (top + 1) block) C per head.

    `s` has the landmarks of all whole blocks, and 0 <= reach <= block. `grouped`: landmarks also weight the blocks of a query
    that attends to every earlier block. With `positions`, q has only the queries there.
    """
    length = k.shape[2]
    if length <= block:
        return attend(q, k, v, scale=scale, positions=positions)
    k_blocks, v_blocks = (in_blocks(x, block) for x in (k, v))
    q = scale * (in_blocks(q, block).flatten(2, 3) if positions is None else q)
    query_positions = torch.arange(q.shape[2], device=q.device)[None] if positions is None else positions
    own = query_positions // block
    chosen, matches = choose(q, s[:, :, : k_blocks.shape[2] - 1], own, top=top)

    # Numbers of tokens that a query attends to, in its own block and in each chosen window.
    own_visible = (query_positions % block + 1)[:, None, :, None]
    far_visible = block + reach * continues(chosen, own)
    own = own[:, None, :, None]

    # A window is a block and the `reach` tokens after it: (B, H, N, block + reach, C).
    k_windows, v_windows = (torch.cat([x, F.pad(x[:, :, 1:, :reach], (0, 0, 0, 0, 0, 1))], dim=3) for x in (k_blocks, v_blocks))
    if positions is None:  # each block has all its queries, in order
        near, near_log, *_ = _AttendFirst.apply(q.unflatten(2, (-1, block)), k_blocks, v_blocks, own_visible.view(-1, block), 1)
        near, near_log = near.flatten(2, 3), near_log.flatten(2, 3)[..., None]
        far, logs = attend_windows(
            q, k_windows, v_windows, chosen, visible=far_visible, always=block, dense_ratio=DENSE_RATIO["all"]
        )
    else:
        # A query with fewer than `top` earlier blocks may also have its own block among the chosen ones.
        far_visible = torch.where(chosen == own, own_visible, far_visible)
        pairs = ((own, chosen), (own_visible, far_visible))
        windows, visible = (torch.cat([x.expand_as(y[..., :1]), y], dim=-1) for x, y in pairs)
        out, logs = attend_windows(
            q, k_windows, v_windows, windows, visible=visible, always=1, dense_ratio=DENSE_RATIO["positions"]
        )
        near, far, near_log, logs = out[:, :, :, 0], out[:, :, :, 1:], logs[..., :1], logs[..., 1:]

    # Without a choice, a window's share follows from its tokens, unless grouped. A later block has no share: its match is -inf.
    logs = matches.to(logs.dtype) if grouped else torch.where((own > top) | (chosen >= own), matches.to(logs.dtype), logs)
    share = torch.cat([near_log, logs], dim=-1).softmax(-1)[..., None].to(far.dtype)
    return (share[..., 0, :] * near + (share[..., 1:, :] * far).sum(3))[:, :, :length]


def naive_landmark_attend(
    q: Queries,
    k: Heads,
    v: Values,
    s: Landmarks,
    *,
    scale: float,
    block: int,
    top: int,
    reach: int,
    grouped: bool = False,
    positions: Positions | None = None,
) -> Float[Tensor, "B H _ E"]:
    """Reference implementation of `landmark_attend`, one query at a time."""
    out = v.new_empty(*q.shape[:3], v.shape[3])
    for b, h, a in torch.cartesian_prod(*map(torch.arange, q.shape[:3])).tolist():
        i = a if positions is None else int(positions[b, a])
        start = i // block * block
        scores = torch.exp(scale * k[b, h] @ q[b, h, a])
        matches = torch.exp(scale * s[b, h, : i // block] @ q[b, h, a])
        chosen = matches.topk(min(top, len(matches))).indices.tolist()
        weights = {j: scores[j] for j in range(start, i + 1)}
        for n in chosen:
            end = (n + 1) * block
            overlap = [] if n + 1 in chosen else range(end, min(end + reach, start))
            tokens = [*range(n * block, end), *overlap]
            share = matches[n] / scores[tokens].sum() if grouped or len(chosen) < len(matches) else 1
            weights |= {j: scores[j] * share for j in tokens}
        out[b, h, a] = sum(weight * v[b, h, j] for j, weight in weights.items()) / sum(weights.values())
    return out


def block_ends(x: Heads, block: int) -> Landmarks:
    """Return the last token of each whole block."""
    return x[:, :, block - 1 :: block]


def in_blocks(x: Heads, block: int) -> Float[Tensor, "B H N block C"]:
    """Split tokens into blocks, the last one padded with zeros."""
    if not torch.compiler.is_compiling() and x.shape[2] % block == 0:  # without a copy
        return x.unflatten(2, (-1, block))
    return in_chunks(x, block, unrolled=True)


def choose(q: Float[Tensor, "B H A C"], landmarks: Landmarks, own: Own, *, top: int) -> tuple[Chosen, Float[Tensor, "B H A T"]]:
    """Return the blocks that each query retrieves, and their matches <q, landmark>.

    A query with fewer than `top` earlier blocks also gets later blocks, with a match of -inf.
    """
    matches = q @ landmarks.mT
    later = torch.arange(landmarks.shape[2], device=q.device) >= own[:, None, :, None]
    chosen = matches.detach().masked_fill(later, float("-inf")).topk(min(top, landmarks.shape[2])).indices
    return chosen, matches.gather(3, chosen).masked_fill(chosen >= own[:, None, :, None], float("-inf"))


def continues(chosen: Chosen, own: Own) -> Bool[Tensor, "B H A T"]:
    """Whether a query also attends to the tokens after a chosen block.

    It does not if their block is its own or also chosen.
    """
    after = chosen + 1
    return ~((after >= own[:, None, :, None]) | (after[..., None] == chosen[..., None, :]).any(-1))


class _AttendFirst(Operation):
    """Attend to the first `visible` tokens, at least `always`.

    Returns the outputs, log sum exp <q, k>, and tensors for the gradient. Uses powers of two, because MKL's exp takes many times
    as long if its result is 0.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, always: int) -> tuple[Tensor, ...]:
        scores = (q / math.log(2)) @ k.mT
        hidden = torch.arange(always, k.shape[-2], device=k.device) >= visible[..., None]
        scores[..., always:].masked_fill_(hidden, float("-inf"))
        peak = scores.amax(-1, keepdim=True)
        weights = scores.sub_(peak).exp2_()
        total = weights.sum(-1, keepdim=True, dtype=torch.promote_types(weights.dtype, torch.float32))
        return (weights @ v).div_(total), math.log(2) * (total.log2() + peak)[..., 0], weights, total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[2:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:3], output[0], *output[2:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor | None, grad_log: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        grad_out = torch.zeros_like(ctx.saved_tensors[3]) if grad_out is None else grad_out
        grad_log = torch.zeros_like(ctx.saved_tensors[5][..., 0]) if grad_log is None else grad_log
        q, k, v, out, weights, total = (saved.to(grad_out.dtype) for saved in ctx.saved_tensors)  # the dtype that autocast chose
        grad_out = grad_out / total
        rest = grad_log[..., None].to(grad_out.dtype) / total - (grad_out * out).sum(-1, keepdim=True)
        grad_scores = (grad_out @ v.mT).add_(rest).mul_(weights)
        return grad_scores @ k, grad_scores.mT @ q, weights.mT @ grad_out, None, None


def attend_windows(
    q: Queries,
    k: Float[Tensor, "B H N W C"],
    v: Float[Tensor, "B H N W E"],
    chosen: Chosen,
    *,
    visible: Int[Tensor, "B H A T"],
    always: int,
    dense_ratio: int,
) -> tuple[Float[Tensor, "B H A T E"], Float[Tensor, "B H A T"]]:
    """Apply `_AttendFirst` to each query and its chosen windows.

    If there are at most `dense_ratio` times as many windows as chosen ones, apply it to each query and all windows.
    """
    batch, heads, windows = k.shape[:3]
    sequences = torch.arange(batch * heads, device=q.device).view(batch, heads, 1, 1)
    window, queries, (k, v) = sequences * windows + chosen, q.shape[2], (x.flatten(0, 2) for x in (k, v))
    if windows <= dense_ratio * chosen.shape[3]:  # one large product is faster than many small ones
        rows = q[:, :, None].expand(-1, -1, windows, -1, -1).flatten(0, 2)
        place = (window * queries + torch.arange(queries, device=q.device)[:, None]).flatten()
    else:
        place, owner, size = in_tiles(window.flatten(), len(k))
        rows = q[:, :, :, None].expand(*chosen.shape, -1).flatten(0, 3)
        rows = rows.new_zeros(len(owner) * size, rows.shape[1]).index_copy(0, place, rows).unflatten(0, (-1, size))
        # F.embedding, because its gradient is summed row by row.
        k, v = (F.embedding(owner, x.flatten(1)).unflatten(1, x.shape[1:]) for x in (k, v))
    # Rows that belong to no query attend to the whole window; their results are not used.
    first = visible.new_full((rows.shape[:2].numel(),), k.shape[1]).index_copy(0, place, visible.flatten()).view(rows.shape[:2])
    results = _AttendFirst.apply(rows, k, v, first, always)[:2]
    out, log = (x.flatten(0, 1).index_select(0, place).unflatten(0, chosen.shape) for x in results)
    return out, log


def in_tiles(group: Int[Tensor, " P"], groups: int) -> tuple[Int[Tensor, " P"], Int[Tensor, " tiles"], int]:
    """Lay out rows in tiles of equal size, each with rows of one group.

    One batched product then computes all groups. `group` is the group of each row. Returns the place of each row in the tiles,
    the group of each tile, and the tile size. The number of tiles does not depend on the sizes of the groups.
    """
    if len(group) <= groups:
        return torch.arange(len(group), device=group.device), group, 1
    size = max(1, len(group) // (3 * groups))
    count = group.new_zeros(groups).scatter_add(0, group, torch.ones_like(group))
    end = (count // size + 1).cumsum(0)
    begin = F.pad(end[:-1], (1, 0))
    order = group.argsort(stable=True)
    rank = torch.arange(len(group), device=group.device) - (count.cumsum(0) - count)[group[order]]
    place = torch.empty_like(group).index_copy(0, order, begin[group[order]] * size + rank)
    tiles = len(group) // size + groups  # an upper bound
    owner = end.new_zeros(tiles + 1).scatter(0, end, 1).cumsum(0)[:-1].clamp(max=groups - 1)
    return place, owner, size
