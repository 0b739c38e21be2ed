"""Multi-token attention: a logit depends on several queries and keys (arXiv 2504.00927); op.py has the formula.

    out = (depth_scale heads / rms(heads)) W_out

Differences from the authors' code: the norm has no learned gain, which W_out can express. Attention weights are mixed between
heads, and not convolved. There is no gate.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from cat.mixers.base import Cache, append_to_cache, last_tokens
from cat.mixers.multi_token.config import MultiTokenConfig
from cat.mixers.multi_token.op import multi_token_attend, multi_token_logits
from cat.mixers.qkv import Attended, DotProductMixer
from cat.ops.common import set_values
from cat.ops.position import rotate
from cat.types import Heads, Positions, Values


class MultiTokenAttention(DotProductMixer):
    """Causal attention over (B, L, D) with a convolution of the logits over queries and keys, one kernel per head.

    Convolutions on q, k and v are optional, as in CAT. The kernels of the logits and the mixing of heads start as the identity:
    without `head_norm`, the start is the transformer's attention.
    """

    config: MultiTokenConfig
    supports_padding = True

    def __init__(self, config: MultiTokenConfig, *, width: int, length: int):
        super().__init__(config, width=width, length=length)
        self.kernel = nn.Parameter(torch.empty(config.heads, config.query_kernel, config.key_kernel))
        self.mixing: nn.Parameter | None = None
        if (size := config.head_groups) > 1:
            self.mixing = nn.Parameter(torch.empty(config.heads // size, size, size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        kernel = torch.zeros(self.kernel.shape)
        kernel[:, 0, self.config.key_kernel // 2] = 1
        set_values(self.kernel, kernel)
        if self.mixing is not None:
            set_values(self.mixing, torch.eye(self.config.head_groups).expand(self.mixing.shape))

    def attend(self, q: Heads, k: Heads, v: Values, *, positions: Positions | None = None) -> Float[Tensor, "B H _ E"]:
        """Return the outputs of the heads. q has all tokens, also with `positions`: a logit depends on earlier queries."""
        if self.config.position == "rotary":
            q, k = rotate(q), rotate(k)
        return self._normalize(multi_token_attend(q, k, v, self.kernel, self.mixing, scale=self.scale, positions=positions))

    def attend_step(self, qkv: tuple[Tensor, ...], cache: Cache) -> Attended:
        """Cache the rotated keys and the values of all tokens, and the last rotated queries: one fewer than `query_kernel`."""
        q, k, v = qkv
        if self.config.position == "rotary":
            q, k = rotate(q, start=cache.length), rotate(k, start=cache.length)
        before = cache.state.get("queries")
        queries, keys, values = (
            append_to_cache(cache, name, x, dim=2) for name, x in (("queries", q), ("keys", k), ("values", v))
        )
        heads = multi_token_attend(
            q, keys, values, self.kernel, self.mixing, scale=self.scale, before=before, padding=cache.padding
        )
        queries = last_tokens(queries, self.config.query_kernel - 1)
        return self._normalize(heads), {"queries": queries, "keys": keys, "values": values}

    def logits(self, q: Heads, k: Heads) -> Float[Tensor, "B H L L"]:
        if self.config.position == "rotary":
            q, k = rotate(q), rotate(k)
        return multi_token_logits(q, k, self.kernel, scale=self.scale)

    def _normalize(self, heads: Float[Tensor, "B H _ E"]) -> Float[Tensor, "B H _ E"]:
        if not self.config.head_norm:
            return heads
        return self.config.depth_scale * F.rms_norm(heads, heads.shape[-1:], eps=1e-5)
