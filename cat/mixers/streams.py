"""What every mixer with queries, keys and values shares: three filtered projections into heads, and the way back.

    Q = (X * F_q) W_q    K = (X * F_k) W_k    V = (X * F_v) W_v        (arXiv 2407.05591, equation 2)

Any of the filters may be absent. They are applied after the projection, with which one filter a head commutes.
"""

import math
from abc import abstractmethod
from typing import ClassVar, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cat.configuration import AttentionModel
from cat.filters import Filter, Layout, alike, apply_together, build_filter
from cat.mixers.base import Memory, Mixer
from cat.normalization import unit
from cat.position import take
from cat.types import Asked, Heads, Hidden, Queries, Values

Projected = Float[Tensor, "B L P"]
"""Queries, keys and values of every token, side by side, as `project` makes them."""


class Streams(Mixer):
    """Maps (B, L, D) to (B, L, D): queries, keys and values, mixed along L by the subclass, then projected back.

    `length` is the training length: what `full` stands for. `scale` is what a product of query and key is multiplied by.
    """

    attends: ClassVar[bool] = True
    """Whether `mix` reads off weighted means of the values."""
    asks: ClassVar[bool] = False
    """Whether a query asks for itself alone: of q, `mix` is then given what stands at the positions that it is to compute."""

    def __init__(self, config: AttentionModel, length: int):
        super().__init__()
        self.config = config
        self.projection = nn.Linear(config.width, 3 * config.width, bias=False)
        self.output = nn.Linear(config.width, config.width, bias=False)
        self.filters = stream_filters(config, length)
        self.together = side_by_side(self.filters)
        self.scale = 1 / math.sqrt(config.width // config.heads)
        self.log_temperature: nn.Parameter | None = None
        if config.qk_norm:
            self.log_temperature = nn.Parameter(torch.full((config.heads,), math.log(8.0)))
            self.scale = 1.0
        elif config.temperature:
            self.log_temperature = nn.Parameter(torch.zeros(config.heads))

    @property
    def steady(self) -> bool:
        return all(cast(Filter, causal).steady for causal in self.filters.values())

    def project(self, x: Float[Tensor, "*tokens D"]) -> Float[Tensor, "*tokens P"]:
        return self.projection(x)

    def combine(self, projected: Projected, at: Asked | None = None) -> Float[Tensor, "B _ D"]:
        return self.merged(self.mix(*self.streams(projected, at if self.asks else None), at=at))

    def merged(self, heads: Values) -> Hidden:
        """What the heads have read, projected back."""
        return self.output(heads.transpose(1, 2).flatten(2))

    @abstractmethod
    def mix(self, q: Queries, k: Heads, v: Values, *, at: Asked | None = None) -> Float[Tensor, "B H _ E"]:
        """What the heads read off the values, causally, at every position or at positions `at`."""

    def logits(self, q: Heads, k: Heads) -> Float[Tensor, "B H L L"] | None:
        """What the softmax of q and k is taken of, -inf where nothing is read; None where there is none."""
        return None

    def streams(self, projected: Projected, at: Asked | None = None) -> tuple[Float[Tensor, "B H _ _"], ...]:
        """What is mixed: filtered q, k and v, q and k scaled; q at every position or at positions `at`."""
        q, k, v = self.filtered(projected, at)
        return *self.scaled(q, k), v

    def filtered(self, projected: Projected, at: Asked | None = None) -> tuple[Queries, Heads, Heads]:
        """The filtered q, k and v; q at every position or at positions `at`."""
        if projected.is_cuda:
            q, k, v = self._filtered_together(projected)
            return take(q, at), k, v
        q, k, v = self.heads(projected)
        q = cast(Filter, self.filters["q"])(q, at) if "q" in self.filters else take(q, at)
        k, v = (self.filters[s](x) if s in self.filters else x for s, x in zip("kv", (k, v), strict=True))
        return q, k, v

    def _filtered_together(self, projected: Projected) -> list[Heads]:
        """On a GPU, slower to launch a kernel than to run it, filters that are alike of streams side by side are one."""
        heads = projected.unflatten(-1, (3, self.config.heads, -1)).permute(2, 0, 3, 1, 4)
        streams = list[Heads]()
        for names, part in zip(self.together, heads.split([len(names) for names in self.together]), strict=True):
            if names[0] in self.filters:
                streams += apply_together([cast(Filter, self.filters[name]) for name in names], part)
            else:
                streams.append(part.squeeze(0))
        return streams

    def heads(self, projected: Projected) -> tuple[Heads, Heads, Heads]:
        """The q, k and v of every head before they are filtered."""
        q, k, v = (stream.unflatten(-1, (self.config.heads, -1)).transpose(1, 2) for stream in projected.chunk(3, dim=-1))
        return q, k, v

    def next_streams(self, projected: Projected, memory: Memory) -> tuple[Heads, Heads, Heads, dict[str, Tensor]]:
        """The `streams` of tokens that follow upon those of `memory`, and by stream the rows that its filter sees next."""
        kept, streams = {}, dict(zip("qkv", self.heads(projected), strict=True))
        for stream, x in streams.items():
            if stream in self.filters:
                causal = cast(Filter, self.filters[stream])
                streams[stream], kept[stream] = causal.read(x, memory.kept.get(stream, x[:, :, :0]))
        return *self.scaled(streams["q"], streams["k"]), streams["v"], kept

    def scaled(self, q: Queries, k: Heads) -> tuple[Queries, Heads]:
        """Both of unit length where `qk_norm` says so, q times a learned temperature."""
        if self.config.qk_norm:
            q, k = unit(q), unit(k)
        if self.log_temperature is not None:
            q = q * self.log_temperature.exp()[:, None, None]
        return q, k


def stream_filters(config: AttentionModel, length: int) -> nn.ModuleDict:
    """The filters of `config` by stream."""
    layout = Layout(
        heads=config.heads,
        channels=config.width // config.heads,
        sharing=config.sharing,
        norm=config.filter_norm,
        bias=config.filter_bias,
    )
    return nn.ModuleDict(
        {
            stream: build_filter(
                layout, taps, init=config.filter_init, length=length, dilation=config.dilation, size=config.filter_size
            )
            for stream, taps in config.filters.items()
        }
    )


def side_by_side(filters: nn.ModuleDict) -> list[str]:
    """The streams in parts: those that lie side by side and have filters that are alike are one, such as "qk" and "v"."""
    parts = ["q"]
    for stream in "kv":
        before = parts[-1][-1]
        if before in filters and stream in filters and alike(cast(Filter, filters[before]), cast(Filter, filters[stream])):
            parts[-1] += stream
        else:
            parts.append(stream)
    return parts
