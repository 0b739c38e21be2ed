"""The gated convolution of Based, its BaseConv (arXiv 2402.18668, section 5; arXiv 2312.04927, section 4):

    u, z = X W_in + b_in    out = (silu(conv(u)) * z) W_out + b_out

`conv` is a causal convolution with one kernel per channel and no bias, started as nn.Conv1d. Without the gate there is no z. This
is the form of the authors' models; that of the synthetic tasks in 2312.04927 has no silu and no W_out.
"""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from cat.mixers.base import Cache, Mixer, last_tokens
from cat.mixers.filters import ExplicitFilter, Layout
from cat.mixers.gated_conv.config import GatedConvConfig
from cat.ops.position import gather_positions
from cat.types import Positions


class GatedConv(Mixer):
    """Map (B, L, D) to (B, L, D) causally, without positions, heads or attention.

    `length` is the training length, the kernel size of `full`.
    """

    supports_padding = True

    def __init__(self, config: GatedConvConfig, *, width: int, length: int):
        super().__init__()
        inner = config.expand * width
        self.in_proj = nn.Linear(width, (1 + config.gate) * inner)
        size = length if config.conv_size == "full" else config.conv_size
        self.convolution = ExplicitFilter(Layout(heads=1, channels=inner, sharing="channel"), size, init="uniform")
        self.o_proj = nn.Linear(inner, width)
        self.inner = inner

    def project(self, x: Float[Tensor, "*tokens D"]) -> Float[Tensor, "*tokens P"]:
        return self.in_proj(x)

    def mix(self, projected: Float[Tensor, "B L P"], positions: Positions | None = None) -> Float[Tensor, "B _ D"]:
        u, gate = self._split(projected)
        convolved = self.convolution(u[:, None]).squeeze(1)
        return self._out(gather_positions(convolved, positions), gather_positions(gate, positions))

    def step(
        self, projected: Float[Tensor, "B L P"], cache: Cache, *, last: bool = False
    ) -> tuple[Float[Tensor, "B _ D"], Cache]:
        """Cache the next inputs of the convolution."""
        u, gate = self._split(projected)
        u, inputs = self.convolution.step(u[:, None], cache.state.get("inputs", u[:, None, :0]))
        convolved, gate = (last_tokens(x, 1) if last else x for x in (u.squeeze(1), gate))
        return self._out(convolved, gate), cache.after(projected.shape[1], {"inputs": inputs})

    def _split(self, projected: Float[Tensor, "B L P"]) -> tuple[Float[Tensor, "B L E"], Float[Tensor, "B L _"]]:
        """Return the inputs of the convolution and the gate, which is empty without one."""
        u, gate = projected.split([self.inner, projected.shape[-1] - self.inner], dim=-1)
        return u, gate

    def _out(self, convolved: Float[Tensor, "B A E"], gate: Float[Tensor, "B A _"]) -> Float[Tensor, "B A D"]:
        u = F.silu(convolved)
        return self.o_proj(u * gate if gate.shape[-1] else u)
