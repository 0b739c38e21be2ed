"""Landmark CAT: a long filter on the keys sums up each block at its last token; a query reads its own block and the best others."""

from cat.configuration import Landmark
from cat.landmark import landmark_attend
from cat.mixers.streams import Streams
from cat.position import rotate
from cat.types import Heads


class LandmarkAttention(Streams):
    """Causal attention over (B, L, D) that reads `top + 1` blocks of `block` tokens a query, filters as its configuration names.

    Blocks overlap by what the longest filter carries over their end, at most by a block.
    """

    def __init__(self, config: Landmark, length: int):
        super().__init__(config, length)
        taps = [stream_filter.taps.shape[1] for stream_filter in self.filters.values()]
        self.reach = min(config.block, max(taps, default=1) - 1)

    def mix(self, q: Heads, k: Heads, v: Heads) -> Heads:
        if self.config.position == "rotary":
            q, k = rotate(q), rotate(k)
        return landmark_attend(q, k, v, scale=self.scale, block=self.config.block, top=self.config.top, reach=self.reach)
