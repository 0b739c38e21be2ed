"""Gated linear attention (arXiv 2312.06635, section 4.4): each token decides how much of each key channel is forgotten.

    alpha = sigmoid(X W_1 W_2 + b)^(1/16)        heads = attend(q, k, v, alpha)
    out = (heads / rms(heads) * silu(X W_gate + b_gate)) W_out

The formula is in cat/gated_linear_attention.py; the gate on the output is there if the configuration says so. The streams are
those of every mixer, where the paper's keys have half as many channels. The gains of its norm are left to W_out.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from cat.configuration import GatedLinear
from cat.gated_linear_attention import gated_linear_attend
from cat.mixers.streams import Projected, Streams
from cat.position import take
from cat.types import Asked, Heads, Queries, Values


class GatedLinearAttention(Streams):
    """Gated linear attention over (B, L, D) with a filter on the streams that its configuration names."""

    attends = False  # weights of either sign, and of any sum

    def __init__(self, config: GatedLinear, length: int):
        super().__init__(config, length)
        self.decay = nn.Sequential(
            nn.Linear(config.width, config.gate_rank, bias=False), nn.Linear(config.gate_rank, config.width)
        )
        self.gate = nn.Linear(config.width, config.width) if config.output_gate else None

    def project(self, x: Float[Tensor, "*tokens D"]) -> Float[Tensor, "*tokens P"]:
        gates = [self.decay(x)] if self.gate is None else [self.decay(x), self.gate(x)]
        return torch.cat([self.projection(x), *gates], dim=-1)

    def mix(self, q: Heads, k: Heads, v: Values, *gates: Heads, at: Asked | None = None) -> Float[Tensor, "B H _ E"]:
        log_decay, *output_gate = gates
        heads = take(gated_linear_attend(q, k, v, log_decay, scale=self.scale), at)
        heads = F.rms_norm(heads, heads.shape[-1:], eps=1e-5)
        return heads * F.silu(take(output_gate[0], at)) if output_gate else heads

    def streams(self, projected: Projected, at: Asked | None = None) -> tuple[Queries, ...]:
        """Filtered q, k and v, then log alpha, then what the gate on the output is made of where there is one."""
        width = self.config.width
        gates = (x.unflatten(-1, (self.config.heads, -1)).transpose(1, 2) for x in projected[..., 3 * width :].split(width, -1))
        log_decay, *output_gate = gates
        return *self.filtered(projected[..., : 3 * width], at), F.logsigmoid(log_decay) / 16, *output_gate
