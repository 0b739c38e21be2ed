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

from cat.config import QKVConfig
from cat.mixers.base import Cache, Mixer, last_tokens
from cat.mixers.filters import Filter, Layout, apply_grouped, build_filter, can_group
from cat.ops.l2norm import l2_normalize
from cat.ops.position import gather_positions
from cat.types import Heads, Hidden, Positions, Queries, Values

Projection = Float[Tensor, "B L P"]
"""Queries, keys and values of every token, side by side, as `project` makes them."""

Attended = tuple[Float[Tensor, "B H _ E"], dict[str, Tensor]]
"""What heads have read, and by name what is kept to go on."""


class QKVMixer(Mixer):
    """Maps (B, L, D) to (B, L, D): queries, keys and values, mixed along L by the subclass, then projected back.

    A subclass says how: `mix` of a whole sequence, `mix_next` of what follows upon tokens that are remembered.

    `length` is the training length: what `full` stands for. `scale` is what a product of query and key is multiplied by.
    """

    supports_positions: ClassVar[bool] = False
    """Whether `mix` can compute some queries alone: of q, it is then given those."""

    def __init__(self, config: QKVConfig, length: int):
        super().__init__()
        self.config = config
        self.projection = nn.Linear(config.width, 3 * config.width, bias=False)
        self.output = nn.Linear(config.width, config.width, bias=False)
        self.filters = build_filters(config, length)
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

    def mix(self, projected: Projection, positions: Positions | None = None) -> Float[Tensor, "B _ D"]:
        return self.merge_heads(
            self.attend(*self.prepare(projected, positions if self.supports_positions else None), positions=positions)
        )

    def step(self, projected: Projection, cache: Cache, *, last: bool = False) -> tuple[Float[Tensor, "B _ D"], Cache]:
        qkv, rows = self.prepare_step(projected, cache, last=last)
        heads, kept = self.attend_step(qkv, cache)
        return self.merge_heads(last_tokens(heads, 1) if last else heads), Cache(
            cache.length + projected.shape[1], {**kept, **rows}
        )

    def merge_heads(self, heads: Values) -> Hidden:
        """What the heads have read, projected back."""
        return self.output(heads.transpose(1, 2).flatten(2))

    @abstractmethod
    def attend(self, q: Queries, k: Heads, v: Values, *, positions: Positions | None = None) -> Float[Tensor, "B H _ E"]:
        """What the heads read off the values, causally, at every position or at positions `at`."""

    @abstractmethod
    def attend_step(self, qkv: tuple[Tensor, ...], cache: Cache) -> Attended:
        """What `mix` makes of tokens that follow upon those of `memory`; and what is kept of all of them."""

    def logits(self, q: Heads, k: Heads) -> Float[Tensor, "B H L L"] | None:
        """What the softmax of q and k is taken of, -inf where nothing is read; None where there is none."""
        return None

    def prepare(self, projected: Projection, positions: Positions | None = None) -> tuple[Float[Tensor, "B H _ ..."], ...]:
        """What is mixed: filtered q, k and v, q and k scaled, and what else there is; q at every position or at `at`."""
        projected, others = self.split_projection(projected)
        q, k, v = self.convolve(projected, positions)
        return *self.scale_qk(q, k), v, *others

    def split_projection(self, projected: Projection) -> tuple[Float[Tensor, "B L _"], list[Tensor]]:
        """What queries, keys and values are made of, and what else of each token is mixed with them."""
        return projected, []

    def convolve(self, projected: Projection, positions: Positions | None = None) -> tuple[Queries, Heads, Heads]:
        """The filtered q, k and v; q at every position or at positions `at`."""
        together = group_adjacent(self.filters, "qkv", projected)
        if positions is None or together[0] != "q" or projected.is_cuda:  # a GPU takes longer to launch a kernel than to run it
            q, k, v = self._convolve(projected, together)
            return gather_positions(q, positions), k, v
        q, k, v = self._convolve(projected, together, positions)
        return q, k, v

    def _convolve(self, projected: Projection, together: list[str], positions: Positions | None = None) -> list[Queries]:
        """By parts, each of streams side by side whose filters are alike: these are one. `at` is of a part that is q alone."""
        qkv, parts = list[Queries](), [projected]
        if len(together) > 1:  # else the gradient would be copied
            parts = list(projected.split([len(names) * self.config.width for names in together], dim=-1))
        for names, part in zip(together, parts, strict=True):
            heads = part.unflatten(-1, (len(names), self.config.heads, -1)).permute(2, 0, 3, 1, 4)
            filters = [cast(Filter, self.filters[name]) for name in names if name in self.filters]
            asked = positions if names == "q" else None
            qkv += apply_grouped(filters, heads, asked) if filters else [gather_positions(heads.squeeze(0), asked)]
        return qkv

    def split_heads(self, projected: Projection) -> tuple[Heads, Heads, Heads]:
        """The q, k and v of every head before they are filtered."""
        q, k, v = (projection.unflatten(-1, (self.config.heads, -1)).transpose(1, 2) for projection in projected.chunk(3, dim=-1))
        return q, k, v

    def prepare_step(self, projected: Projection, cache: Cache, *, last: bool) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """The `streams` of tokens that follow upon those of `memory`, and by stream the rows that its filter sees next.

        Of q, only the `last` one where that is all that is to be mixed.
        """
        projected, others = self.split_projection(projected)
        q, k, v, rows = self.convolve_step(projected, cache, last=last)
        return (*self.scale_qk(q, k), v, *others), rows

    def convolve_step(
        self, projected: Projection, cache: Cache, *, last: bool
    ) -> tuple[Queries, Heads, Heads, dict[str, Tensor]]:
        """As `next_streams`, `filtered` and not scaled."""
        rows, qkv = dict[str, Tensor](), dict(zip("qkv", self.split_heads(projected), strict=True))
        for projection, x in qkv.items():
            if projection in self.filters:
                qkv[projection], rows[projection] = self.filter_step(projection, x, cache)
        q, k, v = qkv.values()
        return last_tokens(q, 1) if last and self.supports_positions else q, k, v, rows

    def filter_step(self, projection: str, x: Heads, cache: Cache) -> tuple[Heads, Float[Tensor, "B H S C"]]:
        """What the filter of the stream makes of rows that follow upon those of `memory`, and the rows that it sees next."""
        return cast(Filter, self.filters[projection]).step(x, cache.state.get(projection, x[:, :, :0]))

    def scale_qk(self, q: Queries, k: Heads) -> tuple[Queries, Heads]:
        """Both of unit length where `qk_norm` says so, q times a learned temperature."""
        if self.config.qk_norm:
            q, k = l2_normalize(q), l2_normalize(k)
        if self.log_temperature is not None:
            q = q * self.log_temperature.exp()[:, None, None]
        return q, k


def build_filters(config: QKVConfig, length: int) -> nn.ModuleDict:
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
            projection: build_filter(
                layout, taps, init=config.filter_init, length=length, dilation=config.dilation, size=config.filter_size
            )
            for projection, taps in config.kernel_sizes.items()
        }
    )


def group_adjacent(filters: nn.ModuleDict, prepare: str, projected: Projection) -> list[str]:
    """The streams in parts: those that lie side by side and have filters that are alike are one, such as "qk" and "v"."""
    parts = [prepare[0]]
    for projection in prepare[1:]:
        before = parts[-1][-1]
        both = before in filters and projection in filters
        if both and can_group(cast(Filter, filters[before]), cast(Filter, filters[projection]), projected):
            parts[-1] += projection
        else:
            parts.append(projection)
    return parts
