"""Landmark CAT: a long filter on the keys sums up a block at its last token, and a query reads the blocks that match it best.

Figure 3 of arXiv 2407.05591; the formula is in cat/landmark.py.
"""

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
        self.block, self.top = config.block, config.top
        self.reach = min(self.block, max((taps.shape[1] for taps in self.filters.parameters()), default=1) - 1)

    def mix(self, q: Heads, k: Heads, v: Heads) -> Heads:
        if self.config.position == "rotary":
            q, k = rotate(q), rotate(k)
        return landmark_attend(q, k, v, scale=self.scale, block=self.block, top=self.top, reach=self.reach)
