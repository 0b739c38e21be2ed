"""Based: exact softmax attention to a window of tokens, and to all before it through second-order Taylor features of exp.

After arXiv 2402.18668; the formula, and how it differs from the paper's layers, are in cat/mixers/based/op.py.
"""

from jaxtyping import Float
from torch import Tensor

from cat.mixers.base import Memory
from cat.mixers.based.config import Based
from cat.mixers.based.op import Past, taylor_attend, taylor_attend_next
from cat.mixers.qkv import Mixed, Streams
from cat.ops.position import rotate
from cat.types import Asked, Heads, Queries, Values


class TaylorAttention(Streams):
    """Causal attention over (B, L, D), exact for `window` tokens, with a filter on the streams that its configuration names."""

    asks = True

    def __init__(self, config: Based, length: int):
        super().__init__(config, length)
        self.window = config.window

    def mix(self, q: Queries, k: Heads, v: Values, *, at: Asked | None = None) -> Float[Tensor, "B H _ E"]:
        if self.config.position == "rotary":
            q, k = rotate(q, at=at), rotate(k)
        return taylor_attend(q, k, v, scale=self.scale, window=self.window, at=at)

    def mix_next(self, streams: tuple[Tensor, ...], memory: Memory) -> Mixed:
        """Keeps the last keys and values, and a sum over all tokens before them."""
        q, k, v = streams
        if self.config.position == "rotary":
            q, k = rotate(q, start=memory.length + k.shape[2] - q.shape[2]), rotate(k, start=memory.length)
        kept = memory.kept
        before = Past(kept["keys"], kept["values"], kept.get("far")) if memory.length else None
        heads, past = taylor_attend_next(q, k, v, state=before, length=memory.length, scale=self.scale, window=self.window)
        return heads, {name: x for name, x in past._asdict().items() if x is not None}
