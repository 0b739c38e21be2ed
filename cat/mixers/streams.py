"""What every mixer with queries, keys and values shares: three filtered projections into heads, and the way back.

    Q = (X * F_q) W_q    K = (X * F_k) W_k    V = (X * F_v) W_v        (arXiv 2407.05591, equation 2)

Any of the filters may be absent. One filter a head, so it is applied after the projection, with which it commutes.
"""

import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import nn

from cat.configuration import AttentionModel
from cat.convolution import filter_heads
from cat.types import Heads, Hidden


class Streams(nn.Module, ABC):
    """Maps (B, L, D) to (B, L, D): queries, keys and values, mixed along L by the subclass, then projected back.

    `length` is the training length: what `full` stands for. `scale` is what a product of query and key is multiplied by.
    """

    def __init__(self, config: AttentionModel, length: int):
        super().__init__()
        self.config = config
        self.projection = nn.Linear(config.width, 3 * config.width, bias=False)
        self.output = nn.Linear(config.width, config.width, bias=False)
        self.filters = stream_filters(config, length)
        self.scale = 1 / math.sqrt(config.width // config.heads)
        if config.qk_norm:
            self.log_temperature = nn.Parameter(torch.full((config.heads,), math.log(8.0)))
            self.scale = 1.0

    def forward(self, x: Hidden) -> Hidden:
        return self.output(self.mix(*self.streams(x)).transpose(1, 2).flatten(2))

    @abstractmethod
    def mix(self, q: Heads, k: Heads, v: Heads) -> Heads:
        """What the heads read off, causally."""

    def streams(self, x: Hidden) -> tuple[Heads, Heads, Heads]:
        """Filtered q, k and v of (B, L, D), q and k of unit length times the temperature where `qk_norm` says so."""
        q, k, v = self.projection(x).unflatten(-1, (3, self.config.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = (self.filters[s](stream) if s in self.filters else stream for s, stream in zip("qkv", (q, k, v), strict=True))
        if self.config.qk_norm:
            q = F.normalize(q, dim=-1) * self.log_temperature.exp()[:, None, None]
            k = F.normalize(k, dim=-1)
        return q, k, v


class HeadFilter(nn.Module):
    """One causal filter of `width` taps a head; it begins as the identity with a little noise."""

    def __init__(self, heads: int, width: int, *, normalised: bool):
        super().__init__()
        self.normalised = normalised
        self.taps = nn.Parameter(0.1 * torch.randn(heads, width) / math.sqrt(width))
        with torch.no_grad():
            self.taps[:, 0] += 1

    def forward(self, x: Heads) -> Heads:
        taps = F.normalize(self.taps, p=1.0, dim=-1) if self.normalised else self.taps
        return filter_heads(x, taps)


def stream_filters(config: AttentionModel, length: int) -> nn.ModuleDict:
    """The filters of `config` by stream: q, k, v."""
    return nn.ModuleDict(
        {
            stream: HeadFilter(config.heads, length if taps == "full" else taps, normalised=config.filter_norm)
            for stream, taps in config.filters.items()
        }
    )
