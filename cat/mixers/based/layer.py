"""Based: linear attention with the features of the second-order Taylor polynomial of exp (arXiv 2402.18668, section 4).

Queries and keys have 16 channels. With a window, attention is exact within it; the paper has that in a layer of its own. op.py
has the formula.
"""

from jaxtyping import Float
from torch import Tensor

from cat.mixers.base import Cache
from cat.mixers.based.config import BasedConfig
from cat.mixers.based.op import Past, taylor_attend, taylor_attend_step
from cat.mixers.qkv import Attended, DotProductMixer
from cat.ops.position import rotate
from cat.types import Heads, Positions, Queries, Values


class Based(DotProductMixer):
    """Causal attention over (B, L, D) with Taylor features.

    Convolutions on q, k and v are optional, and so is a window of exact attention.
    """

    supports_positions = True
    supports_padding = True

    def __init__(self, config: BasedConfig, *, width: int, length: int):
        super().__init__(config, width=width, length=length)
        self.window = config.window or 0

    def attend(self, q: Queries, k: Heads, v: Values, *, positions: Positions | None = None) -> Float[Tensor, "B H _ E"]:
        if self.config.position == "rotary":
            q, k = rotate(q, positions=positions), rotate(k)
        return taylor_attend(q, k, v, scale=self.scale, window=self.window, positions=positions)

    def attend_step(self, qkv: tuple[Tensor, ...], cache: Cache) -> Attended:
        """Cache the last keys and values, and a sum over all earlier tokens."""
        q, k, v = qkv
        if self.config.position == "rotary":
            q, k = rotate(q, start=cache.length + k.shape[2] - q.shape[2]), rotate(k, start=cache.length)
        state = cache.state
        before = Past(state["keys"], state["values"], state.get("far")) if cache.length else None
        heads, past = taylor_attend_step(
            q, k, v, state=before, length=cache.length, scale=self.scale, window=self.window, padding=cache.padding
        )
        return heads, {name: x for name, x in past._asdict().items() if x is not None}
