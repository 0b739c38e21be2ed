"""Mamba: a gated selective state space behind a short convolution (arXiv 2312.00752, figure 3 and section 3.4).

    u, z = X W_in    u = silu(conv(u))    y = scan(u) + skip * u    out = (y * silu(z)) W_out

`conv` is a causal filter a channel, `scan` a state space a channel whose steps, inputs and outputs depend on u.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from cat.mixers.base import Cache, Mixer, append_to_cache, last_tokens
from cat.mixers.mamba.config import MambaConfig
from cat.mixers.mamba.op import selective_scan, selective_scan_next
from cat.ops.position import gather_positions
from cat.types import Positions


class Mamba(Mixer):
    """Maps (B, L, D) to (B, L, D) causally, with no positions, heads or attention; `length` changes nothing."""

    def __init__(self, config: MambaConfig, length: int):
        super().__init__()
        inner = config.expand * config.width
        self.rank = math.ceil(config.width / 16)
        self.state = config.state
        self.input = nn.Linear(config.width, 2 * inner, bias=False)
        self.reach = config.conv_size - 1
        self.convolution = nn.Conv1d(inner, inner, config.conv_size, groups=inner)
        self.selection = nn.Linear(inner, self.rank + 2 * config.state, bias=False)
        self.dt_proj = nn.Linear(self.rank, inner)
        self.output = nn.Linear(inner, config.width, bias=False)
        # Section 3.6: A = -1 .. -S for every channel, and steps between 0.001 and 0.1 before the input has a say.
        self.log_rate = nn.Parameter(torch.arange(1.0, config.state + 1).log().repeat(inner, 1))
        self.skip = nn.Parameter(torch.ones(inner))
        nn.init.uniform_(self.dt_proj.weight, -(self.rank**-0.5), self.rank**-0.5)
        with torch.no_grad():
            self.dt_proj.bias.uniform_(1e-3, 1e-1).expm1_().log_()  # the inverse of softplus

    def project(self, x: Float[Tensor, "*tokens D"]) -> Float[Tensor, "*tokens P"]:
        return self.input(x)

    def mix(self, projected: Float[Tensor, "B L P"], positions: Positions | None = None) -> Float[Tensor, "B _ D"]:
        u, gate = projected.chunk(2, dim=-1)
        u, *others = self._selected(F.pad(u, (0, 0, self.reach, 0)))
        y = selective_scan(u, *others) + self.skip * u
        return self.output(gather_positions(y, positions) * F.silu(gather_positions(gate, positions)))

    def step(
        self, projected: Float[Tensor, "B L P"], cache: Cache, *, last: bool = False
    ) -> tuple[Float[Tensor, "B _ D"], Cache]:
        """Keeps the state, and the rows that the convolution sees next."""
        u, gate = projected.chunk(2, dim=-1)
        rows = append_to_cache(cache, "rows", u, dim=1) if cache.length else F.pad(u, (0, 0, self.reach, 0))
        u, delta, a, b, c = self._selected(rows)
        y, state = selective_scan_next(u, delta, a, b, c, state=cache.state.get("state"))
        y = y + self.skip * u
        if last:
            y, gate = last_tokens(y, 1), last_tokens(gate, 1)
        kept = {"state": state, "rows": last_tokens(rows, self.reach)}
        return self.output(y * F.silu(gate)), Cache(cache.length + projected.shape[1], kept)

    def _selected(self, rows: Float[Tensor, "B R E"]) -> tuple[Tensor, ...]:
        """The convolved u, step sizes, rates, inputs and outputs of the tokens for which the rows before them are there."""
        u = F.silu(self.convolution(rows.mT).mT)
        step, b, c = self.selection(u).split([self.rank, self.state, self.state], dim=-1)
        return u, F.softplus(self.dt_proj(step)), -self.log_rate.exp(), b, c
