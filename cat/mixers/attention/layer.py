"""CAT: out = softmax(mask(Q K^T / sqrt(C))) V.

Q, K and V are convolved projections of the input. Without convolutions this is the transformer's attention.
"""

from functools import partial
from typing import Any

from jaxtyping import Float
from torch import Tensor

from cat.mixers.attention.config import AttentionConfig
from cat.mixers.base import Cache, append_to_cache, last_tokens
from cat.mixers.qkv import Attended, DotProductMixer
from cat.ops.attention import attend, attend_last, logits
from cat.ops.position import alibi_slopes, rotate
from cat.types import Heads, KeyHeads, Positions, Queries, ValueHeads


class CausalAttention(DotProductMixer):
    """Dense causal softmax attention over (B, L, D) with optional convolutions.

    Each head of keys and values may serve several heads of queries.
    """

    config: AttentionConfig
    supports_positions = True
    supports_padding = True

    def attend(self, q: Queries, k: KeyHeads, v: ValueHeads, *, positions: Positions | None = None) -> Float[Tensor, "B H _ E"]:
        return attend(*self._rotated(q, k, positions=positions), v, positions=positions, dropout=self.dropout, **self._options(q))

    def logits(self, q: Heads, k: KeyHeads) -> Float[Tensor, "B H L L"]:
        return logits(*self._rotated(q, k), **self._options(q))

    def attend_step(self, qkv: tuple[Tensor, ...], cache: Cache) -> Attended:
        """Cache the rotated keys and the values of all tokens, or of those that the next token sees."""
        q, k, v = qkv
        q, k = self._rotated(q, k, start=cache.length)
        keys, values = append_to_cache(cache, "keys", k, dim=2), append_to_cache(cache, "values", v, dim=2)
        attention = attend if q.shape[2] == keys.shape[2] else attend_last
        valid = cache.valid(cache.length + k.shape[2])
        valid = None if valid is None else valid[:, -keys.shape[2] :]
        heads = attention(q, keys, values, valid=valid, dropout=self.dropout, **self._options(q))
        if (window := self.config.window) is not None:
            keys, values = last_tokens(keys, window - 1), last_tokens(values, window - 1)
        return heads, {"keys": keys, "values": values}

    @property
    def dropout(self) -> float:
        return self.config.dropout if self.training else 0.0

    def _options(self, like: Tensor) -> dict[str, Any]:
        """Return the arguments that `attend` and `logits` share. `like` gives the device."""
        slopes = alibi_slopes(self.config.heads, like) if self.config.position == "alibi" else None
        return {"scale": self.scale, "slopes": slopes, "window": self.config.window}

    def _rotated(
        self, q: Queries, k: KeyHeads, *, start: int = 0, positions: Positions | None = None
    ) -> tuple[Queries, KeyHeads]:
        """Apply rotary positions if configured.

        The first key is token `start`. The queries are at `positions`, or they are the last tokens.
        """
        if self.config.position != "rotary":
            return q, k
        rotated = partial(rotate, base=self.config.rope_base, scale=self.config.rope_scale)
        return rotated(q, start=start + k.shape[2] - q.shape[2], positions=positions), rotated(k, start=start)
