"""CAT: out = softmax(mask(Q K^T / sqrt(C))) V with Q, K and V each the filtered projection of the input.

Without a filter this is the transformer's attention.
"""

from jaxtyping import Float
from torch import Tensor

from cat.attention import attend, logits
from cat.mixers.streams import Streams
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

    def _placed(self, q: Heads, k: Heads) -> tuple[Heads, Heads, Float[Tensor, "H L L"] | None]:
        """Both with their positions in them, or what these add to the scores."""
        if self.config.position == "rotary":
            q, k = rotate(q), rotate(k)
        return q, k, alibi_bias(self.config.heads, q.shape[2], q) if self.config.position == "alibi" else None
