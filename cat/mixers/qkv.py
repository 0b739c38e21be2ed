"""Base class of mixers with queries, keys and values:

    Q = (X * F_q) W_q    K = (X * F_k) W_k    V = (X * F_v) W_v        (arXiv 2407.05591, equation 2)

Each convolution is optional, and so is an activation after it. Convolutions are applied after the projection. One kernel per head
commutes with the projection; kernels per channel and between heads do not, and act on X W.
"""

import math
from abc import abstractmethod
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from cat.config import DotProductConfig, QKVConfig
from cat.mixers.base import Cache, Mixer, last_tokens
from cat.mixers.canon import Canon
from cat.mixers.filters import Filter, Layout, apply_grouped, build_filter, can_group
from cat.mixers.token_shift import TokenShift
from cat.ops.l2norm import l2_normalize
from cat.ops.linear import apply_linear
from cat.ops.position import gather_positions
from cat.types import Heads, Hidden, KeyHeads, Positions, Queries, ValueHeads, Values

Projection = Float[Tensor, "B L P"]
"""Output of `project`: queries, keys and values of every token, concatenated. With token shift, first the part of the token
itself, then the part for the next token."""

AnyHeads = Float[Tensor, "B _ _ _"]
"""Queries, keys or values, whose heads may differ in number and width."""

Attended = tuple[Float[Tensor, "B H _ E"], dict[str, Tensor]]
"""Outputs of the heads, and the state to cache by name."""


class QKVMixer(Mixer):
    """Map (B, L, D) to (B, L, D): project to q, k and v, attend, project back.

    A subclass defines `attend` for a whole sequence. It may define `attend_step` for the tokens after those in a cache. Without
    it, the cache has the projections of all tokens.

    `length` is the training length, the kernel size of `full`. `scale` multiplies the products of queries and keys.
    """

    supports_positions: ClassVar[bool] = False
    """Whether `attend` can compute a subset of the queries; its q then has only those at `positions`."""

    def __init__(self, config: QKVConfig, *, width: int, length: int):
        super().__init__()
        self.config, self.width = config, width
        self.widths = {name: config.channels_of(name, width) * config.heads_of(name) for name in "qkv"}
        bias = config.linear_bias
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, outputs, bias=bias) for outputs in self.widths.values())
        self.o_proj = nn.Linear(width, width, bias=bias)
        self.filters = build_filters(config, width=width, length=length)
        self.token_shift = TokenShift(width) if config.token_shift else None
        self.canon: Canon | None = None
        """Canon-B, a convolution of q, k and v before their own ones. It belongs to the model, which sets it."""
        self.scale = 1 / math.sqrt(config.channels_of("q", width))

    def extra_repr(self) -> str:
        settings = {"width": self.width, **self.config.model_dump(exclude_defaults=True, exclude={"mixer"})}
        return ", ".join(f"{key}={value}" for key, value in settings.items())

    def project(self, x: Float[Tensor, "*tokens D"]) -> Float[Tensor, "*tokens P"]:
        projections = [self.q_proj, self.k_proj, self.v_proj]
        if self.token_shift is None:
            return apply_linear(x, projections)
        parts = [projection(part) for projection, part in zip(projections, self.token_shift.inputs(x), strict=True)]
        return torch.cat([part[0] for part in parts] + [part[1] for part in parts], dim=-1)

    def mix(self, projected: Projection, positions: Positions | None = None) -> Float[Tensor, "B _ D"]:
        return self.merge_heads(
            self.attend(*self.prepare(projected, positions if self.supports_positions else None), positions=positions)
        )

    def step(self, projected: Projection, cache: Cache, *, last: bool = False) -> tuple[Float[Tensor, "B _ D"], Cache]:
        if type(self).attend_step is QKVMixer.attend_step or (cache.padding is not None and not self.supports_padding):
            return super().step(projected, cache, last=last)
        qkv, inputs = self.prepare_step(projected, cache, last=last)
        padding = cache.new_padding(projected.shape[1])
        if padding is not None:  # with a bias of its filter, v is not zero there
            q, k, v, *others = qkv
            qkv = (q, k, v.masked_fill(padding[:, None, :, None], 0), *others)
        heads, state = self.attend_step(qkv, cache)
        outputs = self.merge_heads(last_tokens(heads, 1) if last else heads)
        return outputs, cache.after(projected.shape[1], {**state, **inputs})

    def merge_heads(self, heads: Values) -> Hidden:
        """Concatenate the heads and apply the output projection."""
        return self.o_proj(heads.transpose(1, 2).flatten(2))

    @abstractmethod
    def attend(self, q: Queries, k: KeyHeads, v: ValueHeads, *, positions: Positions | None = None) -> Float[Tensor, "B H _ E"]:
        """Return the causal outputs of the heads, at every position or at `positions`.

        Keys and values have H heads, unless the configuration says otherwise (`heads_of`).
        """

    def attend_step(self, qkv: tuple[Tensor, ...], cache: Cache) -> Attended:
        """Return the outputs for the tokens after those in `cache`, and the new state. Raises NotImplementedError if omitted.

        With `supports_padding`, tokens that are padding according to `cache` have no weight. Their values are zero already.
        """
        raise NotImplementedError

    def logits(self, q: Heads, k: KeyHeads) -> Float[Tensor, "B H L L"] | None:
        """Return the softmax inputs, -inf if masked; None if there is no softmax."""
        return None

    def prepare(self, projected: Projection, positions: Positions | None = None) -> tuple[Float[Tensor, "B H _ ..."], ...]:
        """Return the inputs of `attend`.

        They are convolved q, k and v, q and k scaled, and further tensors of the subclass. q is at every position or at
        `positions`.
        """
        projected, others = self.split_projection(self.shift(projected))
        q, k, v = self.convolve(projected, positions)
        return *self.scale_qk(q, k), v, *others

    def shift(self, projected: Projection) -> Float[Tensor, "B L _"]:
        """Add to each token the part that its predecessor has for it, if there is a token shift."""
        return self.shift_step(projected, Cache())[0]

    def shift_step(self, projected: Projection, cache: Cache) -> tuple[Float[Tensor, "B L _"], dict[str, Tensor]]:
        """Return the result of `shift` for the tokens after those in `cache`, and the part to cache."""
        if self.token_shift is None:
            return projected, {}
        width = sum(self.widths.values())
        now, for_next, others = projected.split([width, width, projected.shape[-1] - 2 * width], dim=-1)
        qkv, left = self.token_shift.add(now, for_next, cache.state.get("shifted"))
        return torch.cat([qkv, others], dim=-1), {"shifted": left}

    def split_projection(self, projected: Projection) -> tuple[Float[Tensor, "B L _"], list[Tensor]]:
        """Split into q, k and v (concatenated) and further inputs of `attend`."""
        return projected, []

    def convolve(self, projected: Projection, positions: Positions | None = None) -> tuple[Queries, KeyHeads, ValueHeads]:
        """Return the convolved q, k and v; q at every position or at `positions`."""
        if self.canon is not None:
            projected = self.canon(projected)
        groups = group_adjacent(self.filters, "qkv", projected)
        # On a GPU, launching a kernel takes longer than running it, so q is computed at every position.
        if positions is None or groups[0] != "q" or projected.is_cuda:
            q, k, v = self._convolve(projected, groups)
            return gather_positions(q, positions), k, v
        q, k, v = self._convolve(projected, groups, positions)
        return q, k, v

    def _convolve(self, projected: Projection, groups: list[str], positions: Positions | None = None) -> list[AnyHeads]:
        """Convolve each group of adjacent projections in one call.

        `positions` are used if a group is only q.
        """
        qkv: list[AnyHeads] = []
        parts = [projected]
        if len(groups) > 1:  # splitting a single group would copy its gradient
            parts = list(projected.split([sum(self.widths[name] for name in group) for group in groups], dim=-1))
        for group, part in zip(groups, parts, strict=True):
            heads = part.unflatten(-1, (len(group), self.config.heads_of(group[0]), -1)).permute(2, 0, 3, 1, 4)
            filters = [cast(Filter, self.filters[name]) for name in group if name in self.filters]
            group_positions = positions if group == "q" else None
            if filters:
                qkv += map(self.activate, apply_grouped(filters, heads, group_positions))
            else:
                qkv.append(gather_positions(heads.squeeze(0), group_positions))
        return qkv

    def activate(self, x: AnyHeads) -> AnyHeads:
        """Apply the activation after a convolution of q, k or v, if there is one."""
        return F.silu(x) if self.config.conv_activation == "silu" else x

    def split_heads(self, projected: Projection) -> tuple[Heads, KeyHeads, ValueHeads]:
        """Return q, k and v per head, before the convolutions."""
        q, k, v = (
            part.unflatten(-1, (self.config.heads_of(projection), -1)).transpose(1, 2)
            for projection, part in zip("qkv", projected.split([*self.widths.values()], dim=-1), strict=True)
        )
        return q, k, v

    def prepare_step(self, projected: Projection, cache: Cache, *, last: bool) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """Return the inputs of `attend_step` and the inputs to cache by projection.

        With `last`, q may have only the last token.
        """
        projected, shifted = self.shift_step(projected, cache)
        projected, others = self.split_projection(projected)
        q, k, v, inputs = self.convolve_step(projected, cache, last=last)
        return (*self.scale_qk(q, k), v, *others), {**shifted, **inputs}

    def convolve_step(
        self, projected: Projection, cache: Cache, *, last: bool
    ) -> tuple[Queries, KeyHeads, ValueHeads, dict[str, Tensor]]:
        """Return convolved, unscaled q, k and v, and the inputs to cache."""
        inputs: dict[str, Tensor] = {}
        if self.canon is not None:
            projected, inputs["canon_B"] = self.canon.step(projected, cache.state.get("canon_B"))
        qkv = dict(zip("qkv", self.split_heads(projected), strict=True))
        for projection, x in qkv.items():
            if projection in self.filters:
                x, inputs[projection] = self.filter_step(projection, x, cache)
                qkv[projection] = self.activate(x)
        q, k, v = qkv.values()
        return last_tokens(q, 1) if last and self.supports_positions else q, k, v, inputs

    def filter_step(self, projection: str, x: Heads, cache: Cache) -> tuple[Heads, Float[Tensor, "B H S C"]]:
        """Return the convolved tokens after those in `cache`, and the inputs to cache."""
        return cast(Filter, self.filters[projection]).step(x, cache.state.get(projection, x[:, :, :0]))

    def scale_qk(self, q: Queries, k: KeyHeads) -> tuple[Queries, KeyHeads]:
        """Scale queries and keys before they are compared."""
        return q, k


class DotProductMixer(QKVMixer):
    """A mixer whose products of queries and keys can be normalized and have a learned temperature."""

    config: DotProductConfig

    def __init__(self, config: DotProductConfig, *, width: int, length: int):
        super().__init__(config, width=width, length=length)
        self.log_temperature: nn.Parameter | None = None
        if config.qk_norm:
            self.scale = 1.0
        if config.qk_norm or config.temperature:
            self.log_temperature = nn.Parameter(torch.empty(config.heads))
        DotProductMixer.reset_parameters(self)  # not of a subclass, whose tensors do not exist yet

    def reset_parameters(self) -> None:
        """Initialize the temperatures."""
        if self.log_temperature is not None:
            nn.init.constant_(self.log_temperature, math.log(8.0) if self.config.qk_norm else 0.0)

    def scale_qk(self, q: Queries, k: KeyHeads) -> tuple[Queries, KeyHeads]:
        """Apply qk_norm and the learned temperature, if configured."""
        if self.config.qk_norm:
            q, k = l2_normalize(q), l2_normalize(k)
        if self.log_temperature is not None:
            q = q * self.log_temperature.exp()[:, None, None].to(q.dtype)
        return q, k


def build_filters(config: QKVConfig, *, width: int, length: int) -> nn.ModuleDict:
    """Build the filters by projection, for projections with a convolution."""

    def layout(projection: str) -> Layout:
        return Layout(
            heads=config.heads_of(projection),
            channels=config.channels_of(projection, width),
            sharing=config.sharing,
            norm=config.filter_norm,
            bias=config.filter_bias,
            residual=config.residual,
        )

    return nn.ModuleDict(
        {
            projection: build_filter(
                layout(projection),
                kernel_size,
                init=config.filter_init,
                length=length,
                dilation=config.dilation,
                size=config.filter_size,
                init_sum=config.init_sums.get(projection, 1),
            )
            for projection, kernel_size in config.kernel_sizes.items()
        }
    )


def group_adjacent(filters: nn.ModuleDict, projections: str, projected: Projection) -> list[str]:
    """Group adjacent projections that one call can convolve, such as "qk" and "v"."""
    groups = [projections[0]]
    for projection in projections[1:]:
        previous = groups[-1][-1]
        both = previous in filters and projection in filters
        if both and can_group(cast(Filter, filters[previous]), cast(Filter, filters[projection]), projected):
            groups[-1] += projection
        else:
            groups.append(projection)
    return groups
