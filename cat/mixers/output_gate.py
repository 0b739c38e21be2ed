"""The end of a recurrent head: RMSNorm with a learned gain per channel, then an optional gate.

    out = rms_norm(heads) * silu(X W_gate (+ b_gate))

As in the layers of GLA (arXiv 2312.06635) and Gated DeltaNet (2412.06464); all heads share the gain.
"""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

Outputs = Float[Tensor, "B H _ E"]
EPSILON = 1e-5


class GatedNorm(nn.RMSNorm):
    """Normalize each head over its channels, and multiply it by its gate, if there is one."""

    def __init__(self, channels: int):
        super().__init__(channels, eps=EPSILON)

    def forward(self, heads: Outputs, gate: Outputs | None = None) -> Outputs:
        """Return the outputs; `gate` is before its silu."""
        normalized = F.rms_norm(heads, heads.shape[-1:], eps=EPSILON) * self.weight.to(heads.dtype)
        return normalized if gate is None else normalized * F.silu(gate)
