"""Gated DeltaNet (arXiv 2412.06464); without the gate of the state and of the output, DeltaNet (arXiv 2406.06484):

    beta = sigmoid(X W_beta)    log alpha = -rate * softplus(X W_step + b_step)
    heads = delta_rule(q / |q|, k / |k|, v, beta, alpha)
    out = (rms_norm(heads) * silu(X W_gate)) W_out

By default q, k and v are silu of a short convolution per channel of their projections. op.py has the recurrence. The authors'
code scales queries by 1 / sqrt(C), which the norm cancels. In the paper, values are twice as wide as keys.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from cat.mixers.base import Cache
from cat.mixers.delta.config import DeltaConfig
from cat.mixers.delta.op import Rates, delta_rule, delta_rule_step
from cat.mixers.output_gate import GatedNorm
from cat.mixers.qkv import Attended, Projection, QKVMixer
from cat.mixers.step_size import StepSize
from cat.ops.common import set_values
from cat.ops.l2norm import l2_normalize
from cat.ops.position import gather_positions
from cat.types import Heads, Positions, Queries, Values

MIN_RATE, MAX_RATE = 1e-4, 16.0
"""Range of the initial rates. The authors' code starts at 0, whose logarithm is not finite."""


class DeltaRule(QKVMixer):
    """The delta rule over (B, L, D) with optional convolutions, decay and output gate."""

    supports_padding = True

    def __init__(self, config: DeltaConfig, *, width: int, length: int):
        super().__init__(config, width=width, length=length)
        self.decays = config.gate
        self.strength = nn.Linear(width, config.heads, bias=False)
        if config.gate:
            self.dt_proj = StepSize(width, config.heads)
            self.log_rate = nn.Parameter(torch.empty(config.heads))
            self.reset_parameters()
        self.gate = nn.Linear(width, width, bias=False) if config.output_gate else None
        self.norm = GatedNorm(width // config.heads)

    def reset_parameters(self) -> None:
        """Initialize the rates uniformly between 0 and 16, as the authors' code does."""
        if self.decays:
            set_values(self.log_rate, torch.empty(self.log_rate.shape).uniform_(MIN_RATE, MAX_RATE).log())

    def project(self, x: Float[Tensor, "*tokens D"]) -> Float[Tensor, "*tokens P"]:
        others = [self.strength(x)]
        if self.decays:
            others.append(self.dt_proj(x))
        if self.gate is not None:
            others.append(self.gate(x))
        return torch.cat([super().project(x), *others], dim=-1)

    def attend(
        self, q: Heads, k: Heads, v: Values, *others: Tensor, positions: Positions | None = None
    ) -> Float[Tensor, "B H _ E"]:
        rates, gate = self._rates_and_gate(others)
        heads = gather_positions(delta_rule(q, k, v, *rates), positions)
        return self.norm(heads, *(gather_positions(x, positions) for x in gate))

    def attend_step(self, qkv: tuple[Tensor, ...], cache: Cache) -> Attended:
        """Cache the state."""
        q, k, v, *others = qkv
        rates, gate = self._rates_and_gate(others)
        heads, state = delta_rule_step(q, k, v, *rates, state=cache.state.get("state"))
        return self.norm(heads, *gate), {"state": state}

    def scale_qk(self, q: Queries, k: Heads) -> tuple[Queries, Heads]:
        """Scale q and k to unit length."""
        return l2_normalize(q), l2_normalize(k)

    def split_projection(self, projected: Projection) -> tuple[Float[Tensor, "B L _"], list[Tensor]]:
        """Split into q, k and v (concatenated), beta, log alpha if the state decays, and the output gate if any.

        The output gate is before its silu.
        """
        heads = self.config.heads
        # One split: the gradient of each slice would be as large as the whole projection.
        widths = [3 * self.width, *[heads] * (1 + self.decays), *([] if self.gate is None else [self.width])]
        qkv, strength, *others = projected.split(widths, dim=-1)
        rates = [strength.sigmoid().mT, *((-self.log_rate.exp() * F.softplus(step)).mT for step in others[: self.decays])]
        gate = [x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in others[self.decays :]]
        return qkv, [*rates, *gate]

    def _rates_and_gate(self, others: Sequence[Tensor]) -> tuple[Sequence[Rates], Sequence[Values]]:
        return others[: 1 + self.decays], others[1 + self.decays :]
