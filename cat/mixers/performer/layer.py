"""Performer: linear attention with positive orthogonal random features of exp, drawn once with the weights.

FAVOR+ of arXiv 2009.14794; the formula is in cat/mixers/performer/op.py.
"""

from jaxtyping import Float
from torch import Tensor

from cat.mixers.base import Memory
from cat.mixers.performer.config import Performer
from cat.mixers.performer.op import Sums, orthogonal_directions, performer_attend, performer_attend_next
from cat.mixers.qkv import Mixed, Streams
from cat.ops.position import rotate, take
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

    def mix_next(self, streams: tuple[Tensor, ...], memory: Memory) -> Mixed:
        """Keeps a sum over all tokens, and by how much it is divided."""
        q, k, v = streams
        if self.config.position == "rotary":
            q, k = rotate(q, start=memory.length), rotate(k, start=memory.length)
        before = Sums(memory.kept["highest"], memory.kept["products"]) if memory.length else None
        heads, sums = performer_attend_next(q, k, v, state=before, scale=self.scale, directions=self.directions)
        return heads, sums._asdict()
