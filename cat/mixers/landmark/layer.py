"""Landmark CAT: a long filter on the keys sums up a block at its last token, and a query reads the blocks that match it best.

Figure 3 of arXiv 2407.05591; the formula is in cat/mixers/landmark/op.py.
"""

from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from cat.mixers.base import Cache, append_to_cache
from cat.mixers.filters import ExplicitFilter, Filter
from cat.mixers.landmark.config import LandmarkConfig
from cat.mixers.landmark.op import Landmarks, block_ends, landmark_attend
from cat.mixers.qkv import Attended, Projection, QKVMixer
from cat.ops.attention import logits
from cat.ops.l2norm import l2_normalize
from cat.ops.position import rotate
from cat.types import Heads, Positions, Queries, Values


class LandmarkAttention(QKVMixer):
    """Causal attention over (B, L, D) that reads `top + 1` blocks of `block` tokens a query, filters as its configuration names.

    Landmarks are filtered keys; with a `summary` filter, what that makes of them before they are scaled, so that a block is
    summed up with the weights that its tokens have by their length. Blocks overlap by what the longest filter on queries, keys
    and values carries over their end, at most by a block.
    """

    supports_positions = True

    def __init__(self, config: LandmarkConfig, length: int):
        super().__init__(config, length)
        self.block, self.top = config.block, config.top
        lags = [
            (t - 1) * config.dilation if isinstance(t, int) else length for s, t in config.kernel_sizes.items() if s != "summary"
        ]
        self.reach = min(self.block, max(lags, default=0))
        if config.filter_init == "identity" and (isinstance(config.conv_summary, int) or config.conv_summary == "full"):
            cast(ExplicitFilter, self.filters["summary"]).init_moving_sum(self.block)

    def prepare(self, projected: Projection, positions: Positions | None = None) -> tuple[Float[Tensor, "B H _ C"], ...]:
        """Filtered q, k and v, q and k scaled, then the landmarks; q at every position or at positions `at`."""
        q, k, v = self.convolve(projected, positions)
        if "summary" in self.filters:
            landmarks = cast(Filter, self.filters["summary"]).at_block_ends(k, self.block)
        else:
            landmarks = block_ends(k, self.block)
        if self.config.qk_norm:
            landmarks = l2_normalize(landmarks)
        return *self.scale_qk(q, k), v, landmarks

    def attend(
        self, q: Queries, k: Heads, v: Values, landmarks: Landmarks | None = None, *, positions: Positions | None = None
    ) -> Float[Tensor, "B H _ E"]:
        landmarks = block_ends(k, self.block) if landmarks is None else landmarks
        if self.config.position == "rotary":
            q, k, landmarks = rotate(q, positions=positions), rotate(k), rotate(landmarks, start=self.block - 1, step=self.block)
        return landmark_attend(
            q, k, v, landmarks, scale=self.scale, block=self.block, top=self.top, reach=self.reach, positions=positions
        )

    def prepare_step(self, projected: Projection, cache: Cache, *, last: bool) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """The landmarks are those of blocks that end among these tokens."""
        q, k, v, rows = self.convolve_step(projected, cache, last=last)
        landmarks = k
        if "summary" in self.filters:
            landmarks, rows["summary"] = self.filter_step("summary", k, cache)
        landmarks = landmarks[:, :, -(cache.length + 1) % self.block :: self.block]
        if self.config.qk_norm:
            landmarks = l2_normalize(landmarks)
        return (*self.scale_qk(q, k), v, landmarks), rows

    def attend_step(self, qkv: tuple[Tensor, ...], cache: Cache) -> Attended:
        """Keeps the landmarks, and the keys and values of all tokens, as they are attended to."""
        q, k, v, landmarks = qkv
        start, length = cache.length, cache.length + k.shape[2]
        first = length - q.shape[2]
        if self.config.position == "rotary":
            end = start + -(start + 1) % self.block
            q, k, landmarks = rotate(q, start=first), rotate(k, start=start), rotate(landmarks, start=end, step=self.block)
        added = {"keys": k, "values": v, "landmarks": landmarks}
        kept = {name: append_to_cache(cache, name, x, dim=2) for name, x in added.items()}
        at = torch.arange(first, length, device=q.device).expand(len(q), -1) if first else None
        return landmark_attend(
            q, *kept.values(), scale=self.scale, block=self.block, top=self.top, reach=self.reach, positions=at
        ), kept

    def logits(self, q: Heads, k: Heads) -> Float[Tensor, "B H L L"]:
        """Whichever blocks are read."""
        if self.config.position == "rotary":
            q, k = rotate(q), rotate(k)
        return logits(q, k, scale=self.scale)
