"""Gated linear attention (arXiv 2312.06635, section 4.4).

Each token sets the decay of each key channel:

    alpha = sigmoid(X W_1 W_2 + b)^(1/16)        heads = attend(q, k, v, alpha)
    out = (heads / rms(heads) * silu(X W_gate + b_gate)) W_out

op.py has the recurrence. Queries and keys have half as many channels as values. The norm is the RMSNorm with a learned gain of
the authors' code; the paper has LayerNorm.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from cat.mixers.base import Cache
from cat.mixers.gla.config import GLAConfig
from cat.mixers.gla.op import gated_linear_attend, gated_linear_attend_step
from cat.mixers.output_gate import GatedNorm
from cat.mixers.qkv import Attended, Projection, QKVMixer
from cat.ops.position import gather_positions
from cat.types import Heads, Positions, Values


class GatedLinearAttention(QKVMixer):
    """Gated linear attention over (B, L, D) with optional convolutions on q, k and v."""

    supports_padding = True

    def __init__(self, config: GLAConfig, *, width: int, length: int):
        super().__init__(config, width=width, length=length)
        self.decay = nn.Sequential(nn.Linear(width, config.gate_rank, bias=False), nn.Linear(config.gate_rank, self.widths["k"]))
        self.gate = nn.Linear(width, width) if config.output_gate else None
        self.norm = GatedNorm(width // config.heads)

    def project(self, x: Float[Tensor, "*tokens D"]) -> Float[Tensor, "*tokens P"]:
        gates = [self.decay(x)] if self.gate is None else [self.decay(x), self.gate(x)]
        return torch.cat([super().project(x), *gates], dim=-1)

    def attend(
        self, q: Heads, k: Heads, v: Values, *gates: Tensor, positions: Positions | None = None
    ) -> Float[Tensor, "B H _ E"]:
        log_decay, *gate = gates
        heads = gather_positions(gated_linear_attend(q, k, v, log_decay, scale=self.scale), positions)
        return self.norm(heads, *(gather_positions(x, positions) for x in gate))

    def attend_step(self, qkv: tuple[Tensor, ...], cache: Cache) -> Attended:
        """Cache the state."""
        q, k, v, log_decay, *gate = qkv
        heads, state = gated_linear_attend_step(q, k, v, log_decay, state=cache.state.get("state"), scale=self.scale)
        return self.norm(heads, *gate), {"state": state}

    def split_projection(self, projected: Projection) -> tuple[Float[Tensor, "B L _"], list[Tensor]]:
        """Split into q, k and v (concatenated), log alpha, and the output gate if any.

        The output gate is before its silu.
        """
        widths = [sum(self.widths.values()), self.widths["k"], *([] if self.gate is None else [self.width])]
        qkv, *gates = projected.split(widths, dim=-1)
        log_decay, *gate = (x.unflatten(-1, (self.config.heads, -1)).transpose(1, 2) for x in gates)
        return qkv, [F.logsigmoid(log_decay) / 16, *gate]
