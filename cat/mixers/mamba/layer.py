"""Mamba: a gated selective state space model after a short convolution.

Source: arXiv 2312.00752, figure 3 and section 3.4:

    u, z = X W_in    u = silu(conv(u))    y = scan(u) + skip * u    out = (y * silu(z)) W_out

`conv` is a causal convolution with one kernel per channel. `scan` is one state space model per channel with step sizes, input and
output vectors that depend on u.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from cat.mixers.base import Cache, Mixer, append_to_cache, last_tokens
from cat.mixers.mamba.config import MambaConfig
from cat.mixers.mamba.op import selective_scan, selective_scan_step
from cat.mixers.step_size import StepSize
from cat.ops.common import set_values
from cat.ops.conv.causal import filter_channels
from cat.ops.position import gather_positions
from cat.types import Positions


class Mamba(Mixer):
    """Map (B, L, D) to (B, L, D) causally, without positions, heads or attention.

    `length` has no effect.
    """

    supports_padding = True

    def __init__(self, config: MambaConfig, *, width: int, length: int):
        super().__init__()
        inner = config.expand * width
        self.rank = math.ceil(width / 16)
        self.state = config.state
        self.in_proj = nn.Linear(width, 2 * inner, bias=False)
        self.reach = config.conv_size - 1
        self.convolution = nn.Conv1d(inner, inner, config.conv_size, groups=inner)
        self.selection = nn.Linear(inner, self.rank + 2 * config.state, bias=False)
        self.dt_proj = StepSize(self.rank, inner)
        self.o_proj = nn.Linear(inner, width, bias=False)
        self.log_rate, self.skip = nn.Parameter(torch.empty(inner, config.state)), nn.Parameter(torch.empty(inner))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize A = -1 .. -S for every channel (section 3.6), and the skip connection with 1."""
        set_values(self.log_rate, torch.arange(1.0, self.state + 1).log().expand(self.log_rate.shape))
        nn.init.ones_(self.skip)

    def project(self, x: Float[Tensor, "*tokens D"]) -> Float[Tensor, "*tokens P"]:
        return self.in_proj(x)

    def mix(self, projected: Float[Tensor, "B L P"], positions: Positions | None = None) -> Float[Tensor, "B _ D"]:
        u, gate = projected.chunk(2, dim=-1)
        u, *others = self._scan_arguments(u, context=0)
        y = selective_scan(u, *others) + self.skip * u
        return self.o_proj(gather_positions(y, positions) * F.silu(gather_positions(gate, positions)))

    def step(
        self, projected: Float[Tensor, "B L P"], cache: Cache, *, last: bool = False
    ) -> tuple[Float[Tensor, "B _ D"], Cache]:
        """Cache the state and the next inputs of the convolution."""
        u, gate = projected.chunk(2, dim=-1)
        inputs = append_to_cache(cache, "inputs", u, dim=1) if cache.length else F.pad(u, (0, 0, self.reach, 0))
        u, delta, a, b, c = self._scan_arguments(inputs, context=self.reach)
        if (padding := cache.new_padding(u.shape[1])) is not None:  # with the bias of the convolution, u is not zero there
            u = u.masked_fill(padding[..., None], 0)
        y, state = selective_scan_step(u, delta, a, b, c, state=cache.state.get("state"))
        y = y + self.skip * u
        if last:
            y, gate = last_tokens(y, 1), last_tokens(gate, 1)
        new_state = {"state": state, "inputs": last_tokens(inputs, self.reach)}
        return self.o_proj(y * F.silu(gate)), cache.after(projected.shape[1], new_state)

    def _scan_arguments(self, inputs: Float[Tensor, "B R E"], *, context: int) -> tuple[Tensor, ...]:
        """Return the arguments of the scan: convolved u, delta, a, b and c.

        The first `context` inputs are only read by the convolution.
        """
        kernel = self.convolution.weight[:, 0].flip(1)[None]  # PyTorch's conv1d is a correlation: its last value is lag 0
        u = filter_channels(inputs[:, None], kernel).squeeze(1)[:, context:]
        assert self.convolution.bias is not None
        u = F.silu(u + self.convolution.bias)
        step, b, c = self.selection(u).split([self.rank, self.state, self.state], dim=-1)
        return u, F.softplus(self.dt_proj(step)), -self.log_rate.exp(), b, c
