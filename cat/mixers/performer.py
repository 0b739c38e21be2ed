"""Performer: linear attention with positive orthogonal random features of exp, drawn once with the weights.

FAVOR+ of arXiv 2009.14794; the formula is in cat/random_features.py.
"""

from torch import Tensor

from cat.configuration import Performer
from cat.mixers.streams import Streams
from cat.position import rotate
from cat.random_features import orthogonal_directions, performer_attend
from cat.types import Heads, Values


class RandomFeatureAttention(Streams):
    """Causal linear attention over (B, L, D) with random features, and a filter on the streams that its configuration names."""

    directions: Tensor

    def __init__(self, config: Performer, length: int):
        super().__init__(config, length)
        self.register_buffer("directions", orthogonal_directions(config.heads, config.features, config.width // config.heads))

    def mix(self, q: Heads, k: Heads, v: Values) -> Values:
        if self.config.position == "rotary":
            q, k = rotate(q), rotate(k)
        return performer_attend(q, k, v, scale=self.scale, directions=self.directions)
