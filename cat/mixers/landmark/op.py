"""Landmark attention: softmax attention over the query's own block of tokens and the `top` earlier blocks that match it best.

    landmark_n = s at the last token of block n              (arXiv 2407.05591, figure 3: a long filter on k sums up the block)
    chosen_i   = the `top` largest <q_i, landmark_n> over the blocks n that end before the block of i begins
    weight_ij  ~ exp <q_i, k_j>                                              token j <= i of the own block
               ~ exp <q_i, landmark_n> softmax_{j in n} <q_i, k_j>           token j of a chosen block n

The choice is hard, and the landmark's score also says how much of the attention its block gets: the grouped softmax of landmark
attention (arXiv 2305.16300, section 3.1), and the gradient by which landmarks are learnt. A query that reads every earlier block
has chosen nothing, and its weights are exp <q_i, k_j> throughout: dense attention.

A landmark is a sum over the tokens of its block. It tells which tokens are there, not which stood side by side: a key of two
tokens is found by the blocks that have both, and where many have, `top` must be larger than for keys of one token.

Filters carry what belongs together over the end of a block, so a chosen block is read on by `reach` tokens; a token that is in
two of the blocks counts once.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from cat.ops.attention import attend
from cat.ops.common import Operation
from cat.types import Heads, Positions, Queries, Values

Landmarks = Float[Tensor, "B H N C"]
Chosen = Int[Tensor, "B H A T"]
Own = Int[Tensor, "#B A"]
"""The block that each query stands in."""
MANY = {"all": 3, "asked": 8}
"""Up to so many windows for each that is read, every query is computed with all of them, in one large product; with more, queries
are sorted by the window that they read. Of `all` queries of a sequence, or of those `asked`."""


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
    positions: Positions | None = None,
) -> Float[Tensor, "B H _ E"]:
    """Landmark attention at a cost of A (L / block + (top + 1) block) C a head.

    Of all queries or of those at positions `at`, which are then all there are in `q`.

    0 <= reach <= block. `s` has the landmarks of all whole blocks.
    """
    length = k.shape[2]
    if length <= block:
        return attend(q, k, v, scale=scale, positions=positions)
    earlier = (length - 1) // block
    k_blocks, v_blocks = (in_blocks(x, block) for x in (k, v))
    q = scale * (in_blocks(q, block).flatten(2, 3) if positions is None else q)
    place = torch.arange(q.shape[2], device=q.device)[None] if positions is None else positions
    own = place // block
    chosen, matches = choose(q, s[:, :, :earlier], own, top=top)

    near_seen = (place % block + 1)[:, None, :, None]
    far_seen = block + reach * continues(chosen, own)
    own = own[:, None, :, None]

    # A block and what is read on behind it: (B, H, N, block + reach, C).
    k_windows, v_windows = (torch.cat([x, F.pad(x[:, :, 1:, :reach], (0, 0, 0, 0, 0, 1))], dim=3) for x in (k_blocks, v_blocks))
    if positions is None:  # the queries of a block are all there and in order
        near, its_log, *_ = _AttendFirst.apply(q.unflatten(2, (-1, block)), k_blocks, v_blocks, near_seen.view(-1, block), 1)
        near, its_log = near.flatten(2, 3), its_log.flatten(2, 3)[..., None]
        far, logs = attend_windows(q, k_windows, v_windows, chosen, seen=far_seen, always=block, many=MANY["all"])
    else:
        # A query with fewer blocks before its own than there are to choose may have got that as well.
        far_seen = torch.where(chosen == own, near_seen, far_seen)
        windows, seen = (torch.cat([x.expand_as(y[..., :1]), y], dim=-1) for x, y in ((own, chosen), (near_seen, far_seen)))
        out, logs = attend_windows(q, k_windows, v_windows, windows, seen=seen, always=1, many=MANY["asked"])
        near, far, its_log, logs = out[:, :, :, 0], out[:, :, :, 1:], logs[..., :1], logs[..., 1:]

    # Where there is nothing to choose a window counts by its tokens, and that of a later block not at all: its match is -inf.
    logs = torch.where((own > top) | (chosen >= own), matches.to(logs.dtype), logs)
    share = torch.cat([its_log, logs], dim=-1).softmax(-1)[..., None].to(far.dtype)
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
    positions: Positions | None = None,
) -> Float[Tensor, "B H _ E"]:
    """The definition, one query at a time; the twin that `landmark_attend` is tested against."""
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
            share = matches[n] / scores[tokens].sum() if len(chosen) < len(matches) else 1
            weights |= {j: scores[j] * share for j in tokens}
        out[b, h, a] = sum(weight * v[b, h, j] for j, weight in weights.items()) / sum(weights.values())
    return out


def block_ends(x: Heads, block: int) -> Landmarks:
    """The last tokens of whole blocks."""
    return x[:, :, block - 1 :: block]


def in_blocks(x: Heads, block: int) -> Float[Tensor, "B H N block C"]:
    """Zeros in the last one's place of tokens that are not there."""
    missing = -x.shape[2] % block
    return (F.pad(x, (0, 0, 0, missing)) if missing else x).unflatten(2, (-1, block))


def choose(q: Float[Tensor, "B H A C"], landmarks: Landmarks, own: Own, *, top: int) -> tuple[Chosen, Float[Tensor, "B H A T"]]:
    """The blocks that each query retrieves, and how well they match.

    A query that has fewer blocks before its own than there are to choose gets later ones too, whose match is -inf.
    """
    matches = q @ landmarks.mT
    later = torch.arange(landmarks.shape[2], device=q.device) >= own[:, None, :, None]
    chosen = matches.detach().masked_fill(later, float("-inf")).topk(min(top, landmarks.shape[2])).indices
    return chosen, matches.gather(3, chosen).masked_fill(chosen >= own[:, None, :, None], float("-inf"))


def continues(chosen: Chosen, own: Own) -> Bool[Tensor, "B H A T"]:
    """Whether a query reads on behind a chosen block: not into one that it reads anyway."""
    after = chosen + 1
    return ~((after >= own[:, None, :, None]) | (after[..., None] == chosen[..., None, :]).any(-1))


class _AttendFirst(Operation):
    """Each query reads the first `seen` tokens, `always` at least: what it reads, log sum exp <q, k>, and what gradients need.

    In powers of two: MKL's exp takes many times as long where it is 0.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, always: int) -> tuple[Tensor, ...]:
        scores = (q / math.log(2)) @ k.mT
        hidden = torch.arange(always, k.shape[-2], device=k.device) >= seen[..., None]
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
    def backward(ctx: Any, of_out: Tensor, of_log: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        q, k, v, out, weights, total = (saved.to(of_out.dtype) for saved in ctx.saved_tensors)  # as autocast did
        of_out = of_out / total
        rest = of_log[..., None].to(of_out.dtype) / total - (of_out * out).sum(-1, keepdim=True)
        of_scores = (of_out @ v.mT).add_(rest).mul_(weights)
        return of_scores @ k, of_scores.mT @ q, weights.mT @ of_out, None, None


def attend_windows(
    q: Queries,
    k: Float[Tensor, "B H N W C"],
    v: Float[Tensor, "B H N W E"],
    chosen: Chosen,
    *,
    seen: Int[Tensor, "B H A T"],
    always: int,
    many: int,
) -> tuple[Float[Tensor, "B H A T E"], Float[Tensor, "B H A T"]]:
    """`_AttendFirst` of each window that was chosen for a query; of all windows if there are at most `many` times as many."""
    batch, heads, windows = k.shape[:3]
    sequences = torch.arange(batch * heads, device=q.device).view(batch, heads, 1, 1)
    window, queries, (k, v) = sequences * windows + chosen, q.shape[2], (x.flatten(0, 2) for x in (k, v))
    if windows <= many * chosen.shape[3]:  # one large product is sooner done than many small ones
        rows = q[:, :, None].expand(-1, -1, windows, -1, -1).flatten(0, 2)
        place = (window * queries + torch.arange(queries, device=q.device)[:, None]).flatten()
    else:
        place, owner, size = in_tiles(window.flatten(), len(k))
        rows = q[:, :, :, None].expand(*chosen.shape, -1).flatten(0, 3)
        rows = rows.new_zeros(len(owner) * size, rows.shape[1]).index_copy(0, place, rows).unflatten(0, (-1, size))
        # What an embedding is: its gradient is summed row by row.
        k, v = (F.embedding(owner, x.flatten(1)).unflatten(1, x.shape[1:]) for x in (k, v))
    # What no query asked for, it reads whole.
    first = seen.new_full((rows.shape[:2].numel(),), k.shape[1]).index_copy(0, place, seen.flatten()).view(rows.shape[:2])
    step = _AttendFirst.apply(rows, k, v, first, always)[:2]
    out, log = (x.flatten(0, 1).index_select(0, place).unflatten(0, chosen.shape) for x in step)
    return out, log


def in_tiles(group: Int[Tensor, " P"], groups: int) -> tuple[Int[Tensor, " P"], Int[Tensor, " tiles"], int]:
    """Rows laid out group by group in tiles of one size, each group beginning a new tile: one batched product for all groups.

    The place of each row among those of all tiles, the group of each tile, and its size. How many tiles there are does not depend
    on how the rows fall into groups.
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
    tiles = len(group) // size + groups  # as many as there can be
    owner = end.new_zeros(tiles + 1).scatter(0, end, 1).cumsum(0)[:-1].clamp(max=groups - 1)
    return place, owner, size
