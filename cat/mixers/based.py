"""Based: exact softmax attention to a window of tokens, and to all before it through second-order Taylor features of exp.

After arXiv 2402.18668; the formula, and how it differs from the paper's layers, are in cat/taylor.py.
"""

from jaxtyping import Float
from torch import Tensor

from cat.configuration import Based
from cat.mixers.streams import Streams
from cat.position import rotate, take
from cat.taylor import taylor_attend
from cat.types import Asked, Heads, Values


class TaylorAttention(Streams):
    """Causal attention over (B, L, D), exact for `window` tokens, with a filter on the streams that its configuration names."""

    def __init__(self, config: Based, length: int):
        super().__init__(config, length)
        self.window = config.window

    def mix(self, q: Heads, k: Heads, v: Values, *, at: Asked | None = None) -> Float[Tensor, "B H _ E"]:
        if self.config.position == "rotary":
            q, k = rotate(q), rotate(k)
        return take(taylor_attend(q, k, v, scale=self.scale, window=self.window), at)
