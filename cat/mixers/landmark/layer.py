"""Landmark CAT: attention to the blocks whose landmarks match the query best.

A long convolution on the keys summarizes each block at its last token. Figure 3 of arXiv 2407.05591; op.py has the formula.
"""

from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from cat.mixers.base import Cache, append_to_cache
from cat.mixers.filters import Filter
from cat.mixers.landmark.config import LandmarkConfig
from cat.mixers.landmark.op import Landmarks, block_ends, landmark_attend
from cat.mixers.qkv import Attended, DotProductMixer, Projection
from cat.ops.attention import logits
from cat.ops.l2norm import l2_normalize
from cat.ops.position import rotate
from cat.types import Heads, Positions, Queries, Values


class LandmarkAttention(DotProductMixer):
    """Causal attention over (B, L, D) to `top + 1` blocks of tokens per query.

    Landmarks are convolved keys. With `conv_summary`, they are the output of that convolution on the keys before these are
    scaled, so that the norm of a token's key weights the token in the summary. Blocks overlap by the reach of the longest
    convolution on queries, keys and values, at most by one block.
    """

    config: LandmarkConfig
    supports_positions = True

    def __init__(self, config: LandmarkConfig, *, width: int, length: int):
        super().__init__(config, width=width, length=length)
        self.block, self.top = config.block, config.top
        reaches = [
            (size - 1) * config.dilation if isinstance(size, int) else length
            for projection, size in config.kernel_sizes.items()
            if projection != "summary"
        ]
        self.reach = min(self.block, max(reaches, default=0))

    def prepare(self, projected: Projection, positions: Positions | None = None) -> tuple[Float[Tensor, "B H _ C"], ...]:
        """Return convolved q, k and v, q and k scaled, and the landmarks.

        q is at every position or at `positions`.
        """
        q, k, v = self.convolve(self.shift(projected), positions)
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
        return landmark_attend(q, k, v, landmarks, positions=positions, **self._options(k))

    def prepare_step(self, projected: Projection, cache: Cache, *, last: bool) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """Return the inputs of `attend_step` and the inputs to cache.

        The landmarks are of the blocks that end among the new tokens.
        """
        projected, shifted = self.shift_step(projected, cache)
        q, k, v, inputs = self.convolve_step(projected, cache, last=last)
        landmarks = k
        if "summary" in self.filters:
            landmarks, inputs["summary"] = self.filter_step("summary", k, cache)
        landmarks = landmarks[:, :, -(cache.length + 1) % self.block :: self.block]
        if self.config.qk_norm:
            landmarks = l2_normalize(landmarks)
        return (*self.scale_qk(q, k), v, landmarks), {**shifted, **inputs}

    def attend_step(self, qkv: tuple[Tensor, ...], cache: Cache) -> Attended:
        """Cache the landmarks and the keys, both rotated, and the values of all tokens."""
        q, k, v, landmarks = qkv
        start, length = cache.length, cache.length + k.shape[2]
        first = length - q.shape[2]
        if self.config.position == "rotary":
            end = start + -(start + 1) % self.block
            q, k, landmarks = rotate(q, start=first), rotate(k, start=start), rotate(landmarks, start=end, step=self.block)
        added = {"keys": k, "values": v, "landmarks": landmarks}
        state = {name: append_to_cache(cache, name, x, dim=2) for name, x in added.items()}
        positions = torch.arange(first, length, device=q.device).expand(len(q), -1) if first else None
        return landmark_attend(q, *state.values(), positions=positions, **self._options(state["keys"])), state

    def _options(self, k: Heads) -> dict[str, Any]:
        """Return the arguments that every call has. Soft training retrieves as many blocks as there can be."""
        grouped = self.config.train_on == "all"
        top = k.shape[2] if grouped and self.training else self.top
        return {"scale": self.scale, "block": self.block, "top": top, "reach": self.reach, "grouped": grouped}

    def logits(self, q: Heads, k: Heads) -> Float[Tensor, "B H L L"]:
        """Return the scores of all tokens, whether or not their block is chosen."""
        if self.config.position == "rotary":
            q, k = rotate(q), rotate(k)
        return logits(q, k, scale=self.scale)
