"""DeltaNet (arXiv 2406.06484); with a gate, Gated DeltaNet (arXiv 2412.06464):

    beta = sigmoid(X W_beta)    log alpha = -rate * softplus(X W_step + b_step)
    out = delta_rule(q / |q|, k / |k|, v, beta, alpha)

op.py has the recurrence. Unlike the papers' layers, this layer has the study's optional convolutions. The papers have short
convolutions and silu on q, k and v before the rule, and a norm after it; the second paper also has an output gate. Their code
scales queries by 1 / sqrt(C), which the norm cancels. Here is neither, so a key retrieves the stored value at its full size.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from cat.mixers.base import Cache
from cat.mixers.delta.config import DeltaConfig
from cat.mixers.delta.op import Rates, delta_rule, delta_rule_step
from cat.mixers.qkv import Attended, Projection, QKVMixer
from cat.mixers.step_size import StepSize
from cat.ops.common import set_values
from cat.ops.l2norm import l2_normalize
from cat.ops.position import gather_positions
from cat.types import Heads, Positions, Queries, Values


class DeltaRule(QKVMixer):
    """The delta rule over (B, L, D) with optional convolutions and an optional gate."""

    supports_padding = True

    def __init__(self, config: DeltaConfig, *, width: int, length: int):
        super().__init__(config, width=width, length=length)
        self.gate = config.gate
        self.strength = nn.Linear(width, config.heads, bias=False)
        if config.gate:
            self.dt_proj = StepSize(width, config.heads)
            self.log_rate = nn.Parameter(torch.empty(config.heads))
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize the rates between 1 and 16, as the code of Mamba-2 does (arXiv 2405.21060)."""
        if self.gate:
            set_values(self.log_rate, torch.empty(self.log_rate.shape).uniform_(1, 16).log())

    def project(self, x: Float[Tensor, "*tokens D"]) -> Float[Tensor, "*tokens P"]:
        rates = [self.strength(x), self.dt_proj(x)] if self.gate else [self.strength(x)]
        return torch.cat([super().project(x), *rates], dim=-1)

    def attend(
        self, q: Heads, k: Heads, v: Values, *rates: Rates, positions: Positions | None = None
    ) -> Float[Tensor, "B H _ E"]:
        return gather_positions(delta_rule(q, k, v, *rates), positions)

    def attend_step(self, qkv: tuple[Tensor, ...], cache: Cache) -> Attended:
        """Cache the state."""
        heads, state = delta_rule_step(*qkv, state=cache.state.get("state"))
        return heads, {"state": state}

    def scale_qk(self, q: Queries, k: Heads) -> tuple[Queries, Heads]:
        """Scale q and k to unit length."""
        return l2_normalize(q), l2_normalize(k)

    def split_projection(self, projected: Projection) -> tuple[Float[Tensor, "B L _"], list[Tensor]]:
        """Split into q, k and v (concatenated), beta and, with a gate, log alpha."""
        width = 3 * self.width
        strength, *step = projected[..., width:].split(self.config.heads, dim=-1)
        return projected[..., :width], [strength.sigmoid().mT, *((-self.log_rate.exp() * F.softplus(s)).mT for s in step)]
