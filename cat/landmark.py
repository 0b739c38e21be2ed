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

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cat.attention import attend
from cat.types import Asked, Heads, Queries, Values

Landmarks = Float[Tensor, "B H N C"]
Chosen = Int[Tensor, "B H A T"]
Own = Int[Tensor, "#B A"]
"""The block that each query stands in."""
MANY = 8
"""More windows than so many for each that is chosen are not computed with one and all."""


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
    at: Asked | None = None,
) -> Float[Tensor, "B H _ E"]:
    """Landmark attention at a cost of A (L / block + (top + 1) block) C a head.

    Of all queries or of those at positions `at`, which are then all there are in `q`.

    0 <= reach <= block. `s` has the landmarks of all whole blocks.
    """
    length = k.shape[2]
    if length <= block:
        return attend(q, k, v, scale=scale, at=at)
    earlier = (length - 1) // block
    k_blocks, v_blocks = (in_blocks(x, block) for x in (k, v))
    q = scale * (in_blocks(q, block).flatten(2, 3) if at is None else q)
    place = torch.arange(q.shape[2], device=q.device)[None] if at is None else at
    own = place // block
    chosen, matches = choose(q, s[:, :, :earlier], own, top=top)

    later = torch.arange(block, device=q.device) > (place % block)[:, None, :, None]
    if at is None:  # the queries of a block are all there and in order
        near = (q.unflatten(2, (-1, block)) @ k_blocks.mT).flatten(2, 3)
    else:
        its_own = own[:, None, :, None].expand(-1, q.shape[1], -1, 1)
        near = score(q, k_blocks, its_own)[:, :, :, 0]
    near = near.masked_fill(later, float("-inf"))

    # One window a block that can be chosen: (B, H, blocks, block + reach, C).
    k_windows, v_windows = (torch.cat([x[:, :, :-1], x[:, :, 1:, :reach]], dim=3) for x in (k_blocks, v_blocks))
    far = score(q, k_windows, chosen)
    far = far.masked_fill(~visible(chosen, own, block=block, reach=reach), float("-inf"))
    choosing = (own > top)[:, None, :, None]
    # Where there is nothing to choose a match counts nothing, but that of a later block, -inf, which takes its window away.
    matches = matches.masked_fill(~choosing & (chosen < own[:, None, :, None]), 0)
    far = torch.where(choosing[..., None], far.log_softmax(-1), far) + matches[..., None]

    weights = torch.cat([near, far.flatten(3)], dim=-1).softmax(-1)
    near, far = weights[..., :block], weights[..., block:].unflatten(3, (-1, block + reach))
    if at is None:
        out = (near.unflatten(2, (-1, block)) @ v_blocks).flatten(2, 3)
    else:
        out = read(near[:, :, :, None], v_blocks, its_own)
    return (out + read(far, v_windows, chosen))[:, :, :length]


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
    at: Asked | None = None,
) -> Float[Tensor, "B H _ E"]:
    """The definition, one query at a time; the twin that `landmark_attend` is tested against."""
    out = v.new_empty(*q.shape[:3], v.shape[3])
    for b, h, a in torch.cartesian_prod(*map(torch.arange, q.shape[:3])).tolist():
        i = a if at is None else int(at[b, a])
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


def ends(x: Heads, block: int) -> Landmarks:
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
    matches = matches.masked_fill(later, float("-inf"))
    best = matches.topk(min(top, landmarks.shape[2]))
    return best.indices, best.values


def visible(chosen: Chosen, own: Own, *, block: int, reach: int) -> Bool[Tensor, "B H A T W"]:
    """Whether a query reads a token of a chosen window, W = block + reach: it reads on into no block that it reads anyway."""
    own = own[:, None, :, None]
    inside = torch.arange(block + reach, device=chosen.device) < block
    after = chosen + 1
    read_anyway = (after >= own) | (after[..., None] == chosen[..., None, :]).any(-1)
    return inside | ~read_anyway[..., None]


def score(q: Float[Tensor, "B H A C"], windows: Float[Tensor, "B H N W C"], chosen: Chosen) -> Float[Tensor, "B H A T W"]:
    """Each query times the keys of the windows that were chosen for it."""
    if _few(windows, chosen):
        every = (q @ windows.flatten(2, 3).mT).unflatten(3, windows.shape[2:4])
        return every.gather(3, chosen[..., None].expand(*chosen.shape, windows.shape[3]))
    return _by_window(q[:, :, :, None].expand(*chosen.shape, -1), windows.mT, chosen)


def read(weights: Float[Tensor, "B H A T W"], windows: Float[Tensor, "B H N W E"], chosen: Chosen) -> Float[Tensor, "B H A E"]:
    """The sum of the values in the windows that were chosen, by their weights."""
    if _few(windows, chosen):
        every = weights.new_zeros(*weights.shape[:3], *windows.shape[2:4])
        every = every.scatter(3, chosen[..., None].expand_as(weights), weights)
        return every.flatten(3) @ windows.flatten(2, 3)
    return _by_window(weights, windows, chosen).sum(3)


def _few(windows: Float[Tensor, "B H N X Y"], chosen: Chosen) -> bool:
    """Whether to compute with all windows and pick: one large product is sooner done than many small ones."""
    return windows.shape[2] <= MANY * chosen.shape[3]


def _by_window(
    rows: Float[Tensor, "B H A T X"], windows: Float[Tensor, "B H N X Y"], chosen: Chosen
) -> Float[Tensor, "B H A T Y"]:
    """Each row times the window that was chosen for it."""
    sequences = torch.arange(chosen.shape[0] * chosen.shape[1], device=chosen.device).view(*chosen.shape[:2], 1, 1)
    group = (sequences * windows.shape[2] + chosen).flatten()
    return grouped_matmul(rows.flatten(0, 3), windows.flatten(0, 2), group).view(*chosen.shape, windows.shape[4])


def grouped_matmul(
    rows: Float[Tensor, "P X"], matrices: Float[Tensor, "G X Y"], group: Int[Tensor, " P"]
) -> Float[Tensor, "P Y"]:
    """Row p times matrix group[p], without a copy of the matrix for every row.

    Rows are laid out group by group in tiles of one size, each group beginning a new tile: one batched product, whose shape does
    not depend on how the rows fall into groups. Places that no row takes are zero.
    """
    groups, size = len(matrices), max(1, len(rows) // max(1, 2 * len(matrices)))
    tiles = len(rows) // size + groups  # as many as there can be
    count = group.new_zeros(groups).scatter_add(0, group, torch.ones_like(group))
    end = (count // size + 1).cumsum(0)
    begin = F.pad(end[:-1], (1, 0))
    order = group.argsort(stable=True)
    rank = torch.arange(len(rows), device=rows.device) - (count.cumsum(0) - count)[group[order]]
    place = torch.empty_like(group).index_copy(0, order, begin[group[order]] * size + rank)
    owner = end.new_zeros(tiles + 1).scatter(0, end, 1).cumsum(0)[:-1].clamp(max=groups - 1)
    tiled = rows.new_zeros(tiles * size, rows.shape[1]).index_copy(0, place, rows).unflatten(0, (tiles, size))
    return (tiled @ matrices.index_select(0, owner)).flatten(0, 1).index_select(0, place)
