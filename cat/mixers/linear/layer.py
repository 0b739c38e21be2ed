"""LinCAT: linear attention over filtered queries, keys and values; without a filter, plain linear attention.

LinCAT of arXiv 2407.05591 at a cost that is linear in the sequence; the formula is in cat/mixers/linear/op.py.
"""

from jaxtyping import Float
from torch import Tensor

from cat.mixers.base import Memory
from cat.mixers.linear.op import Sums, linear_attend, linear_attend_next
from cat.mixers.qkv import Mixed, Streams
from cat.ops.position import take
from cat.types import Asked, Heads, Values


class LinearAttention(Streams):
    """Causal linear attention over (B, L, D) with a filter on the streams that its configuration names."""

    def mix(self, q: Heads, k: Heads, v: Values, *, at: Asked | None = None) -> Float[Tensor, "B H _ E"]:
        return take(linear_attend(q, k, v, rotary=self.config.position == "rotary"), at)

    def mix_next(self, streams: tuple[Tensor, ...], memory: Memory) -> Mixed:
        """Keeps two sums over all tokens."""
        q, k, v = streams
        before = Sums(memory.kept["keys"], memory.kept["products"]) if memory.length else None
        heads, sums = linear_attend_next(q, k, v, state=before, start=memory.length, rotary=self.config.position == "rotary")
        return heads, sums._asdict()
