"""Landmark attention: softmax attention over the query's own block of tokens and the `top` earlier blocks that match it best.

    landmark_n = k at the last token of block n                    (arXiv 2407.05591, figure 3: a long filter on k sums up the block)
    chosen_i   = the `top` largest <q_i, landmark_n> over the blocks n that end before the block of i begins
    out_i      = softmax attention of q_i over the tokens up to i of its block and those of the chosen blocks

Filters carry what belongs together over the end of a block, so a chosen block is read on by `reach` tokens; a token that is in
two of the blocks counts once. Where every block is chosen this is dense attention.

The choice is hard. Its gradient comes from a gate on each chosen block, p_n / p_n in the forward pass, where p is the softmax of
the landmarks' scores and the denominator a constant (arXiv 1308.3432): a block that serves better than the average of what the
query read is to match better. A query that reads every block has chosen nothing, and has no gate.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from cat.attention import attend
from cat.types import Heads

Chosen = Int[Tensor, "B H L T"]


def landmark_attend(q: Heads, k: Heads, v: Heads, *, scale: float, block: int, top: int, reach: int) -> Heads:
    """Landmark attention at a cost of L (L / block + (top + 1) block) C a head, 0 <= reach <= block."""
    length = q.shape[2]
    if length <= block:
        return attend(q, k, v, scale=scale)
    earlier = (length - 1) // block
    q, k, v = (F.pad(x, (0, 0, 0, -length % block)) for x in (q * scale, k, v))
    chosen, gate = choose(q, k[:, :, block - 1 : earlier * block : block], block=block, top=top)

    own = q.unflatten(2, (-1, block)) @ k.unflatten(2, (-1, block)).mT
    own = own.masked_fill(~torch.ones_like(own[0, 0, 0], dtype=torch.bool).tril(), float("-inf")).flatten(2, 3)
    # Windows (B, H, blocks, C, block + reach), one a block that can be chosen.
    k_windows, v_windows = (x[:, :, : earlier * block + reach].unfold(2, block + reach, block) for x in (k, v))
    far = read(q[:, :, :, None].expand(*chosen.shape, -1), k_windows, chosen) + gate[..., None]
    far = far.masked_fill(~visible(chosen, block=block, reach=reach), float("-inf"))

    weights = torch.cat([own, far.flatten(3)], dim=-1).softmax(-1)
    own, far = weights[..., :block], weights[..., block:].unflatten(3, (-1, block + reach))
    out = (own.unflatten(2, (-1, block)) @ v.unflatten(2, (-1, block))).flatten(2, 3)
    return (out + read(far, v_windows.mT, chosen).sum(3))[:, :, :length]


def naive_landmark_attend(q: Heads, k: Heads, v: Heads, *, scale: float, block: int, top: int, reach: int) -> Heads:
    """The definition, one query at a time; the twin that `landmark_attend` is tested against."""
    out = torch.empty_like(v)
    for b, h, i in torch.cartesian_prod(*map(torch.arange, q.shape[:3])).tolist():
        start = i // block * block
        matches = scale * k[b, h, block - 1 : start : block] @ q[b, h, i]
        chosen = matches.topk(min(top, len(matches))).indices.tolist()
        brought_by = {t: n for n in chosen for t in range((n + 1) * block, min((n + 1) * block + reach, start))}
        brought_by |= {t: n for n in chosen for t in range(n * block, (n + 1) * block)}
        tokens = [*brought_by, *range(start, i + 1)]
        weights = torch.exp(scale * k[b, h, tokens] @ q[b, h, i])
        if len(chosen) < len(matches):
            gate = matches.softmax(0)[list(brought_by.values())]
            weights = weights * torch.cat([gate / gate.detach(), gate.new_ones(len(tokens) - len(gate))])
        out[b, h, i] = weights / weights.sum() @ v[b, h, tokens]
    return out


def choose(q: Heads, landmarks: Float[Tensor, "B H N C"], *, block: int, top: int) -> tuple[Chosen, Float[Tensor, "B H L T"]]:
    """Blocks that each query retrieves, and log p - log p of them: zero, with the gradient of the choice.

    A query that has fewer blocks before its own than there are to choose gets later ones too, which are not `visible` to it.
    """
    matches = q @ landmarks.mT
    own = torch.arange(q.shape[2], device=q.device)[:, None] // block
    # The least number and not -inf, which has no gradient where no block is open.
    matches = matches.masked_fill(torch.arange(landmarks.shape[2], device=q.device) >= own, torch.finfo(matches.dtype).min)
    chosen = matches.topk(min(top, landmarks.shape[2])).indices
    log_p = matches.log_softmax(-1).gather(-1, chosen).masked_fill(own <= top, 0)
    return chosen, log_p - log_p.detach()


def visible(chosen: Chosen, *, block: int, reach: int) -> Tensor:
    """Whether a query sees a token of the window of a block (B, H, L, T, block + reach): if the block ends before the query's own
    begins, and if the token is in no other block that the query reads."""
    own = torch.arange(chosen.shape[2], device=chosen.device)[:, None] // block
    inside = torch.arange(block + reach, device=chosen.device) < block
    after = chosen + 1
    read_anyway = (after >= own) | (after[..., None] == chosen[..., None, :]).any(-1)
    return (chosen < own)[..., None] & (inside | ~read_anyway[..., None])


def read(rows: Float[Tensor, "B H L T X"], windows: Float[Tensor, "B H N X Y"], chosen: Chosen) -> Float[Tensor, "B H L T Y"]:
    """Each row times the window that was chosen for it."""
    sequences = torch.arange(chosen.shape[0] * chosen.shape[1], device=chosen.device).view(*chosen.shape[:2], 1, 1)
    group = (sequences * windows.shape[2] + chosen).flatten()
    return grouped_matmul(rows.flatten(0, 3), windows.flatten(0, 2), group).view(*chosen.shape, -1)


def grouped_matmul(rows: Float[Tensor, "P X"], matrices: Float[Tensor, "G X Y"], group: Int[Tensor, " P"]) -> Float[Tensor, "P Y"]:
    """Row p times matrix group[p], without a copy of the matrix for every row.

    Rows are laid out group by group in tiles of one size, each group beginning a new tile: one batched product, whose shape does
    not depend on how the rows fall into groups.
    """
    size = max(1, len(rows) // (2 * len(matrices)))
    tiles = len(rows) // size + len(matrices)
    count = group.bincount(minlength=len(matrices))
    last = ((count + size - 1) // size).cumsum(0)
    order = group.argsort(stable=True)
    rank = torch.arange(len(rows), device=rows.device) - (count.cumsum(0) - count)[group[order]]
    first = F.pad(last[:-1], (1, 0))
    place = torch.empty_like(group).index_copy(0, order, first[group[order]] * size + rank)
    tile_group = torch.searchsorted(last, torch.arange(tiles, device=rows.device), right=True).clamp(max=len(matrices) - 1)
    tiled = rows.new_zeros(tiles * size, rows.shape[1]).index_copy(0, place, rows).unflatten(0, (tiles, size))
    return (tiled @ matrices.index_select(0, tile_group)).flatten(0, 1).index_select(0, place)
