"""LinCAT: linear attention over filtered queries, keys and values; without a filter, plain linear attention.

LinCAT of arXiv 2407.05591 at a cost that is linear in the sequence; the formula is in cat/mixers/linear/op.py.
"""

from jaxtyping import Float
from torch import Tensor

from cat.mixers.base import Cache
from cat.mixers.linear.op import Sums, linear_attend, linear_attend_next
from cat.mixers.qkv import Attended, QKVMixer
from cat.ops.position import gather_positions
from cat.types import Heads, Positions, Values


class LinearAttention(QKVMixer):
    """Causal linear attention over (B, L, D) with a filter on the streams that its configuration names."""

    def attend(self, q: Heads, k: Heads, v: Values, *, positions: Positions | None = None) -> Float[Tensor, "B H _ E"]:
        return gather_positions(linear_attend(q, k, v, rotary=self.config.position == "rotary"), positions)

    def attend_step(self, qkv: tuple[Tensor, ...], cache: Cache) -> Attended:
        """Keeps two sums over all tokens."""
        q, k, v = qkv
        before = Sums(cache.state["keys"], cache.state["products"]) if cache.length else None
        heads, sums = linear_attend_next(q, k, v, state=before, start=cache.length, rotary=self.config.position == "rotary")
        return heads, sums._asdict()
