"""LinCAT: linear attention over convolved queries, keys and values.

Without convolutions it is plain linear attention. LinCAT is of arXiv 2407.05591. Its cost is linear in the sequence length. op.py
has the formula.
"""

from jaxtyping import Float
from torch import Tensor

from cat.mixers.base import Cache
from cat.mixers.linear.op import Sums, linear_attend, linear_attend_step
from cat.mixers.qkv import Attended, DotProductMixer
from cat.ops.position import gather_positions
from cat.types import Heads, Positions, Values


class LinearAttention(DotProductMixer):
    """Causal linear attention over (B, L, D) with optional convolutions on q, k and v."""

    supports_padding = True

    def attend(self, q: Heads, k: Heads, v: Values, *, positions: Positions | None = None) -> Float[Tensor, "B H _ E"]:
        return gather_positions(linear_attend(q, k, v, rotary=self.config.position == "rotary"), positions)

    def attend_step(self, qkv: tuple[Tensor, ...], cache: Cache) -> Attended:
        """Cache two sums over all tokens."""
        q, k, v = qkv
        before = Sums(cache.state["keys"], cache.state["products"]) if cache.length else None
        heads, sums = linear_attend_step(
            q,
            k,
            v,
            state=before,
            start=cache.length,
            rotary=self.config.position == "rotary",
            padding=cache.new_padding(k.shape[2]),
        )
        return heads, sums._asdict()
