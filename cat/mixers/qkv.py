"""What every mixer with queries, keys and values shares: three filtered projections into heads, and the way back.

    Q = (X * F_q) W_q    K = (X * F_k) W_k    V = (X * F_v) W_v        (arXiv 2407.05591, equation 2)

Any of the filters may be absent. They are applied after the projection, with which one filter a head commutes; filters a channel
and from head to head do not, and are those of X W.
"""

import math
from abc import abstractmethod
from typing import ClassVar, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cat.config import AttentionModel
from cat.mixers.base import Memory, Mixer, tail
from cat.mixers.filters import Filter, Layout, alike, apply_together, build_filter
from cat.ops.l2norm import unit
from cat.ops.position import take
from cat.types import Asked, Heads, Hidden, Queries, Values

Projected = Float[Tensor, "B L P"]
"""Queries, keys and values of every token, side by side, as `project` makes them."""

Mixed = tuple[Float[Tensor, "B H _ E"], dict[str, Tensor]]
"""What heads have read, and by name what is kept to go on."""


class Streams(Mixer):
    """Maps (B, L, D) to (B, L, D): queries, keys and values, mixed along L by the subclass, then projected back.

    A subclass says how: `mix` of a whole sequence, `mix_next` of what follows upon tokens that are remembered.

    `length` is the training length: what `full` stands for. `scale` is what a product of query and key is multiplied by.
    """

    asks: ClassVar[bool] = False
    """Whether `mix` can compute some queries alone: of q, it is then given those."""

    def __init__(self, config: AttentionModel, length: int):
        super().__init__()
        self.config = config
        self.projection = nn.Linear(config.width, 3 * config.width, bias=False)
        self.output = nn.Linear(config.width, config.width, bias=False)
        self.filters = stream_filters(config, length)
        self.scale = 1 / math.sqrt(config.width // config.heads)
        self.log_temperature: nn.Parameter | None = None
        if config.qk_norm:
            self.log_temperature = nn.Parameter(torch.full((config.heads,), math.log(8.0)))
            self.scale = 1.0
        elif config.temperature:
            self.log_temperature = nn.Parameter(torch.zeros(config.heads))

    def extra_repr(self) -> str:
        said = self.config.model_dump(exclude_defaults=True, exclude={"mixer", "layers", "mlp"})
        return ", ".join(f"{key}={value}" for key, value in said.items())

    def project(self, x: Float[Tensor, "*tokens D"]) -> Float[Tensor, "*tokens P"]:
        return self.projection(x)

    def combine(self, projected: Projected, at: Asked | None = None) -> Float[Tensor, "B _ D"]:
        return self.merged(self.mix(*self.streams(projected, at if self.asks else None), at=at))

    def read(self, projected: Projected, memory: Memory, *, last: bool = False) -> tuple[Float[Tensor, "B _ D"], Memory]:
        streams, rows = self.next_streams(projected, memory, last=last)
        heads, kept = self.mix_next(streams, memory)
        return self.merged(tail(heads, 1) if last else heads), Memory(memory.length + projected.shape[1], {**kept, **rows})

    def merged(self, heads: Values) -> Hidden:
        """What the heads have read, projected back."""
        return self.output(heads.transpose(1, 2).flatten(2))

    @abstractmethod
    def mix(self, q: Queries, k: Heads, v: Values, *, at: Asked | None = None) -> Float[Tensor, "B H _ E"]:
        """What the heads read off the values, causally, at every position or at positions `at`."""

    @abstractmethod
    def mix_next(self, streams: tuple[Tensor, ...], memory: Memory) -> Mixed:
        """What `mix` makes of tokens that follow upon those of `memory`; and what is kept of all of them."""

    def logits(self, q: Heads, k: Heads) -> Float[Tensor, "B H L L"] | None:
        """What the softmax of q and k is taken of, -inf where nothing is read; None where there is none."""
        return None

    def streams(self, projected: Projected, at: Asked | None = None) -> tuple[Float[Tensor, "B H _ ..."], ...]:
        """What is mixed: filtered q, k and v, q and k scaled, and what else there is; q at every position or at `at`."""
        projected, others = self.apart(projected)
        q, k, v = self.filtered(projected, at)
        return *self.scaled(q, k), v, *others

    def apart(self, projected: Projected) -> tuple[Float[Tensor, "B L _"], list[Tensor]]:
        """What queries, keys and values are made of, and what else of each token is mixed with them."""
        return projected, []

    def filtered(self, projected: Projected, at: Asked | None = None) -> tuple[Queries, Heads, Heads]:
        """The filtered q, k and v; q at every position or at positions `at`."""
        together = side_by_side(self.filters, "qkv", projected)
        if at is None or together[0] != "q" or projected.is_cuda:  # a GPU takes longer to launch a kernel than to run it
            q, k, v = self._filtered(projected, together)
            return take(q, at), k, v
        q, k, v = self._filtered(projected, together, at)
        return q, k, v

    def _filtered(self, projected: Projected, together: list[str], at: Asked | None = None) -> list[Queries]:
        """By parts, each of streams side by side whose filters are alike: these are one. `at` is of a part that is q alone."""
        streams, parts = list[Queries](), [projected]
        if len(together) > 1:  # else the gradient would be copied
            parts = list(projected.split([len(names) * self.config.width for names in together], dim=-1))
        for names, part in zip(together, parts, strict=True):
            heads = part.unflatten(-1, (len(names), self.config.heads, -1)).permute(2, 0, 3, 1, 4)
            filters = [cast(Filter, self.filters[name]) for name in names if name in self.filters]
            asked = at if names == "q" else None
            streams += apply_together(filters, heads, asked) if filters else [take(heads.squeeze(0), asked)]
        return streams

    def heads(self, projected: Projected) -> tuple[Heads, Heads, Heads]:
        """The q, k and v of every head before they are filtered."""
        q, k, v = (stream.unflatten(-1, (self.config.heads, -1)).transpose(1, 2) for stream in projected.chunk(3, dim=-1))
        return q, k, v

    def next_streams(self, projected: Projected, memory: Memory, *, last: bool) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """The `streams` of tokens that follow upon those of `memory`, and by stream the rows that its filter sees next.

        Of q, only the `last` one where that is all that is to be mixed.
        """
        projected, others = self.apart(projected)
        q, k, v, rows = self.next_filtered(projected, memory, last=last)
        return (*self.scaled(q, k), v, *others), rows

    def next_filtered(
        self, projected: Projected, memory: Memory, *, last: bool
    ) -> tuple[Queries, Heads, Heads, dict[str, Tensor]]:
        """As `next_streams`, `filtered` and not scaled."""
        rows, streams = dict[str, Tensor](), dict(zip("qkv", self.heads(projected), strict=True))
        for stream, x in streams.items():
            if stream in self.filters:
                streams[stream], rows[stream] = self.next_of(stream, x, memory)
        q, k, v = streams.values()
        return tail(q, 1) if last and self.asks else q, k, v, rows

    def next_of(self, stream: str, x: Heads, memory: Memory) -> tuple[Heads, Float[Tensor, "B H S C"]]:
        """What the filter of the stream makes of rows that follow upon those of `memory`, and the rows that it sees next."""
        return cast(Filter, self.filters[stream]).read(x, memory.kept.get(stream, x[:, :, :0]))

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


def side_by_side(filters: nn.ModuleDict, streams: str, projected: Projected) -> list[str]:
    """The streams in parts: those that lie side by side and have filters that are alike are one, such as "qk" and "v"."""
    parts = [streams[0]]
    for stream in streams[1:]:
        before = parts[-1][-1]
        both = before in filters and stream in filters
        if both and alike(cast(Filter, filters[before]), cast(Filter, filters[stream]), projected):
            parts[-1] += stream
        else:
            parts.append(stream)
    return parts
