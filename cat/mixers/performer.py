"""Performer: linear attention with positive orthogonal random features of exp, drawn once with the weights.

FAVOR+ of arXiv 2009.14794; the formula is in cat/random_features.py.
"""

from jaxtyping import Float
from torch import Tensor

from cat.configuration import Performer
from cat.mixers.streams import Streams
from cat.position import rotate, take
from cat.random_features import orthogonal_directions, performer_attend
from cat.types import Asked, Heads, Values


class RandomFeatureAttention(Streams):
    """Causal linear attention over (B, L, D) with random features, and a filter on the streams that its configuration names."""

    directions: Tensor

    def __init__(self, config: Performer, length: int):
        super().__init__(config, length)
        self.register_buffer("directions", orthogonal_directions(config.heads, config.features, config.width // config.heads))

    def mix(self, q: Heads, k: Heads, v: Values, *, at: Asked | None = None) -> Float[Tensor, "B H _ E"]:
        if self.config.position == "rotary":
            q, k = rotate(q), rotate(k)
        return take(performer_attend(q, k, v, scale=self.scale, directions=self.directions), at)
