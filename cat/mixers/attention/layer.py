"""CAT: out = softmax(mask(Q K^T / sqrt(C))) V with Q, K and V each the filtered projection of the input.

Without a filter this is the transformer's attention.
"""

from jaxtyping import Float
from torch import Tensor

from cat.mixers.base import Memory, joined
from cat.mixers.qkv import Mixed, Streams
from cat.ops.attention import attend, attend_last, logits
from cat.ops.position import rotate
from cat.types import Asked, Heads, Queries, Values


class CausalAttention(Streams):
    """Dense causal attention over (B, L, D) with a filter on the streams that its configuration names."""

    asks = True

    def mix(self, q: Queries, k: Heads, v: Values, *, at: Asked | None = None) -> Float[Tensor, "B H _ E"]:
        return attend(*self._placed(q, k, at=at), v, scale=self.scale, alibi=self.alibi, at=at)

    def logits(self, q: Heads, k: Heads) -> Float[Tensor, "B H L L"]:
        return logits(*self._placed(q, k), scale=self.scale, alibi=self.alibi)

    def mix_next(self, streams: tuple[Tensor, ...], memory: Memory) -> Mixed:
        """Keeps the keys and values of all tokens as they are attended to."""
        q, k, v = streams
        q, k = self._placed(q, k, start=memory.length)
        keys, values = joined(memory, "keys", k, dim=2), joined(memory, "values", v, dim=2)
        attended = attend if q.shape[2] == keys.shape[2] else attend_last
        return attended(q, keys, values, scale=self.scale, alibi=self.alibi), {"keys": keys, "values": values}

    @property
    def alibi(self) -> bool:
        """Whether scores fall with the distance."""
        return self.config.position == "alibi"

    def _placed(self, q: Queries, k: Heads, *, start: int = 0, at: Asked | None = None) -> tuple[Queries, Heads]:
        """Both turned by their positions where these are rotary; the first key is token `start`.

        The queries are those `at`, or the last ones as many as there are.
        """
        if self.config.position == "rotary":
            return rotate(q, start=start + k.shape[2] - q.shape[2], at=at), rotate(k, start=start)
        return q, k
