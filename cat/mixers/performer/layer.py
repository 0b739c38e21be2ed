"""Performer: linear attention with positive orthogonal random features of exp.

FAVOR+ of arXiv 2009.14794, with C ln C features for C channels; op.py has the formula. The features are drawn once at
initialization. The authors draw them again during training, which this layer does not.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from cat.mixers.base import Cache
from cat.mixers.performer.config import PerformerConfig
from cat.mixers.performer.op import Sums, orthogonal_directions, performer_attend, performer_attend_step
from cat.mixers.qkv import Attended, DotProductMixer
from cat.ops.common import set_values
from cat.ops.position import gather_positions, rotate
from cat.types import Heads, Positions, Values


class Performer(DotProductMixer):
    """Causal linear attention over (B, L, D) with random features.

    Convolutions on q, k and v are optional.
    """

    supports_padding = True
    directions: Tensor

    def __init__(self, config: PerformerConfig, *, width: int, length: int):
        super().__init__(config, width=width, length=length)
        self.register_buffer("directions", torch.empty(config.heads, config.count_features(width), width // config.heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize the temperatures and draw the directions."""
        super().reset_parameters()
        set_values(self.directions, orthogonal_directions(*self.directions.shape))

    def attend(self, q: Heads, k: Heads, v: Values, *, positions: Positions | None = None) -> Float[Tensor, "B H _ E"]:
        if self.config.position == "rotary":
            q, k = rotate(q), rotate(k)
        return gather_positions(performer_attend(q, k, v, scale=self.scale, directions=self.directions), positions)

    def attend_step(self, qkv: tuple[Tensor, ...], cache: Cache) -> Attended:
        """Cache a sum over all tokens and the log of its scale."""
        q, k, v = qkv
        if self.config.position == "rotary":
            # Random features depend on the angles of queries and keys, and not only on their difference.
            positions = cache.positions(k.shape[2])
            q, k = (rotate(x, start=cache.length, positions=positions) for x in (q, k))
        before = Sums(cache.state["log_max"], cache.state["products"]) if cache.length else None
        heads, sums = performer_attend_step(
            q, k, v, state=before, scale=self.scale, directions=self.directions, padding=cache.new_padding(k.shape[2])
        )
        return heads, sums._asdict()
