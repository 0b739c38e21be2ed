"""CAT: out = softmax(mask(Q K^T / sqrt(C))) V.

Q, K and V are convolved projections of the input. Without convolutions this is the transformer's attention.
"""

from jaxtyping import Float
from torch import Tensor

from cat.mixers.base import Cache, append_to_cache
from cat.mixers.qkv import Attended, DotProductMixer
from cat.ops.attention import attend, attend_last, logits
from cat.ops.position import rotate
from cat.types import Heads, Positions, Queries, Values


class CausalAttention(DotProductMixer):
    """Dense causal softmax attention over (B, L, D) with optional convolutions."""

    supports_positions = True
    supports_padding = True

    def attend(self, q: Queries, k: Heads, v: Values, *, positions: Positions | None = None) -> Float[Tensor, "B H _ E"]:
        return attend(*self._rotated(q, k, positions=positions), v, scale=self.scale, alibi=self.alibi, positions=positions)

    def logits(self, q: Heads, k: Heads) -> Float[Tensor, "B H L L"]:
        return logits(*self._rotated(q, k), scale=self.scale, alibi=self.alibi)

    def attend_step(self, qkv: tuple[Tensor, ...], cache: Cache) -> Attended:
        """Cache the rotated keys and the values of all tokens."""
        q, k, v = qkv
        q, k = self._rotated(q, k, start=cache.length)
        keys, values = append_to_cache(cache, "keys", k, dim=2), append_to_cache(cache, "values", v, dim=2)
        attention = attend if q.shape[2] == keys.shape[2] else attend_last
        heads = attention(q, keys, values, scale=self.scale, alibi=self.alibi, valid=cache.valid(keys.shape[2]))
        return heads, {"keys": keys, "values": values}

    @property
    def alibi(self) -> bool:
        return self.config.position == "alibi"

    def _rotated(self, q: Queries, k: Heads, *, start: int = 0, positions: Positions | None = None) -> tuple[Queries, Heads]:
        """Apply rotary positions if configured.

        The first key is token `start`. The queries are at `positions`, or they are the last tokens.
        """
        if self.config.position == "rotary":
            return rotate(q, start=start + k.shape[2] - q.shape[2], positions=positions), rotate(k, start=start)
        return q, k
