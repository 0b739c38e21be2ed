"""Landmark CAT: a long filter on the keys sums up a block at its last token, and a query reads the blocks that match it best.

Figure 3 of arXiv 2407.05591; the formula is in cat/mixers/landmark/op.py.
"""

from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from cat.mixers.base import Memory, joined
from cat.mixers.filters import ExplicitFilter, Filter
from cat.mixers.landmark.config import Landmark
from cat.mixers.landmark.op import Landmarks, ends, landmark_attend
from cat.mixers.qkv import Mixed, Projected, Streams
from cat.ops.attention import logits
from cat.ops.l2norm import unit
from cat.ops.position import rotate
from cat.types import Asked, Heads, Queries, Values


class LandmarkAttention(Streams):
    """Causal attention over (B, L, D) that reads `top + 1` blocks of `block` tokens a query, filters as its configuration names.

    Landmarks are filtered keys; with a `summary` filter, what that makes of them before they are scaled, so that a block is
    summed up with the weights that its tokens have by their length. Blocks overlap by what the longest filter on queries, keys
    and values carries over their end, at most by a block.
    """

    asks = True

    def __init__(self, config: Landmark, length: int):
        super().__init__(config, length)
        self.block, self.top = config.block, config.top
        lags = [(t - 1) * config.dilation if isinstance(t, int) else length for s, t in config.filters.items() if s != "summary"]
        self.reach = min(self.block, max(lags, default=0))
        if config.filter_init == "identity" and (isinstance(config.summary, int) or config.summary == "full"):
            cast(ExplicitFilter, self.filters["summary"]).begin_as_sum(self.block)

    def streams(self, projected: Projected, at: Asked | None = None) -> tuple[Float[Tensor, "B H _ C"], ...]:
        """Filtered q, k and v, q and k scaled, then the landmarks; q at every position or at positions `at`."""
        q, k, v = self.filtered(projected, at)
        if "summary" in self.filters:
            landmarks = cast(Filter, self.filters["summary"]).at_ends(k, self.block)
        else:
            landmarks = ends(k, self.block)
        if self.config.qk_norm:
            landmarks = unit(landmarks)
        return *self.scaled(q, k), v, landmarks

    def mix(
        self, q: Queries, k: Heads, v: Values, landmarks: Landmarks | None = None, *, at: Asked | None = None
    ) -> Float[Tensor, "B H _ E"]:
        landmarks = ends(k, self.block) if landmarks is None else landmarks
        if self.config.position == "rotary":
            q, k, landmarks = rotate(q, at=at), rotate(k), rotate(landmarks, start=self.block - 1, step=self.block)
        return landmark_attend(q, k, v, landmarks, scale=self.scale, block=self.block, top=self.top, reach=self.reach, at=at)

    def next_streams(self, projected: Projected, memory: Memory, *, last: bool) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """The landmarks are those of blocks that end among these tokens."""
        q, k, v, rows = self.next_filtered(projected, memory, last=last)
        landmarks = k
        if "summary" in self.filters:
            landmarks, rows["summary"] = self.next_of("summary", k, memory)
        landmarks = landmarks[:, :, -(memory.length + 1) % self.block :: self.block]
        if self.config.qk_norm:
            landmarks = unit(landmarks)
        return (*self.scaled(q, k), v, landmarks), rows

    def mix_next(self, streams: tuple[Tensor, ...], memory: Memory) -> Mixed:
        """Keeps the landmarks, and the keys and values of all tokens, as they are attended to."""
        q, k, v, landmarks = streams
        start, length = memory.length, memory.length + k.shape[2]
        first = length - q.shape[2]
        if self.config.position == "rotary":
            end = start + -(start + 1) % self.block
            q, k, landmarks = rotate(q, start=first), rotate(k, start=start), rotate(landmarks, start=end, step=self.block)
        added = {"keys": k, "values": v, "landmarks": landmarks}
        kept = {name: joined(memory, name, x, dim=2) for name, x in added.items()}
        at = torch.arange(first, length, device=q.device).expand(len(q), -1) if first else None
        return landmark_attend(q, *kept.values(), scale=self.scale, block=self.block, top=self.top, reach=self.reach, at=at), kept

    def logits(self, q: Heads, k: Heads) -> Float[Tensor, "B H L L"]:
        """Whichever blocks are read."""
        if self.config.position == "rotary":
            q, k = rotate(q), rotate(k)
        return logits(q, k, scale=self.scale)
