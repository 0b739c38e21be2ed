"""CAT: out = softmax(mask(Q K^T / sqrt(C))) V with Q, K and V each the filtered projection of the input.

Without a filter this is the transformer's attention.
"""

from jaxtyping import Float
from torch import Tensor

from cat.attention import attend, attend_last, logits
from cat.mixers.base import Memory, joined
from cat.mixers.streams import Projected, Streams
from cat.position import alibi_bias, rotate
from cat.types import Asked, Heads, Values


class CausalAttention(Streams):
    """Dense causal attention over (B, L, D) with a filter on the streams that its configuration names."""

    def mix(self, q: Heads, k: Heads, v: Values, *, at: Asked | None = None) -> Float[Tensor, "B H _ E"]:
        q, k, bias = self._placed(q, k)
        return attend(q, k, v, scale=self.scale, bias=bias, at=at)

    def logits(self, q: Heads, k: Heads) -> Float[Tensor, "B H L L"]:
        q, k, bias = self._placed(q, k)
        return logits(q, k, scale=self.scale, bias=bias)

    def read(self, projected: Projected, memory: Memory) -> tuple[Float[Tensor, "B L D"], Memory]:
        """Keeps the keys and values of all tokens as they are attended to, and the rows that the filters see next."""
        q, k, v, kept = self.next_streams(projected, memory)
        q, k, bias = self._placed(q, k, start=memory.length)
        keys, values = joined(memory, "keys", k, dim=2), joined(memory, "values", v, dim=2)
        if memory.length == 0:
            heads = attend(q, k, v, scale=self.scale, bias=bias)
        else:
            heads = attend_last(q, keys, values, scale=self.scale, bias=bias)
        return self.merged(heads), Memory(memory.length + projected.shape[1], {"keys": keys, "values": values, **kept})

    def _placed(self, q: Heads, k: Heads, start: int = 0) -> tuple[Heads, Heads, Float[Tensor, "H _ _"] | None]:
        """The first of them token `start`: both with their positions in them, or what these add to the scores."""
        if self.config.position == "rotary":
            q, k = rotate(q, start=start), rotate(k, start=start)
        alibi = self.config.position == "alibi"
        return q, k, alibi_bias(self.config.heads, start + q.shape[2], q, start=start) if alibi else None
