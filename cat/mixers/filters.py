"""A causal filter on one stream: where its taps come from, and who shares them.

    explicit   F_j is a weight, for j < W
    decay      F_j = sum_n c_n a_n^j + d [j = 0]          a fixed: time constants (to 1/e) from 1 token to a training length
    state      the same with a = exp(-exp(r)) learned     a diagonal state space, h_t = a h_{t-1} + x_t, y_t = <c, h_t> + d x_t
    network    F_j = e^{-w j} <c, sin(U f(j) + b)> + d [j = 0]     f(j)_m = exp(-j / s_m): an implicit filter (arXiv 2302.10866)

All but the first generate taps for a sequence of any length. State-space filters are open question 2 of arXiv 2407.05591.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from cat.config import KernelSize
from cat.ops.common import autocast_to_compute_dtype
from cat.ops.conv.causal import (
    dilate,
    filter_channels,
    filter_groups,
    filter_heads,
    filter_heads_at,
    is_short,
    is_sparse,
    mix_heads,
)
from cat.ops.l2norm import min_norm
from cat.ops.position import gather_positions
from cat.types import GroupedHeads, Heads, Positions, Queries

FEATURES = 8
"""Time scales in which the network of an implicit filter sees how far back a tap is."""


Init = Literal["identity", "random"]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What a filter is applied to, and how."""

    heads: int
    channels: int
    """Channels of a head."""
    sharing: Literal["head", "channel", "mixing"] = "head"
    norm: bool = False
    """Divide the taps by the sum of their absolute values, of generated ones by that of as many as a training sequence has."""
    bias: bool = False

    @property
    def rows(self) -> tuple[int, ...]:
        """(H,) where a head's channels share their taps, (H, C) where each has its own, (H, H) from every head to every head."""
        return {"head": (self.heads,), "channel": (self.heads, self.channels), "mixing": (self.heads, self.heads)}[self.sharing]


class Filter(nn.Module, ABC):
    """Maps (B, H, L, C) to (B, H, L, C): the taps (*rows, W) of the subclass applied, a bias added where there is one."""

    dilation = 1
    train_length: int | None = None
    """Tokens of a training sequence, where taps are generated."""

    def __init__(self, layout: Layout):
        super().__init__()
        self.layout = layout
        self.bias = nn.Parameter(torch.zeros(layout.heads, 1, layout.channels)) if layout.bias else None

    @abstractmethod
    def generate(self, length: int) -> Tensor:
        """The taps (*rows, W) for a sequence of `length` tokens."""

    @property
    def reach(self) -> int | None:
        """How many tokens before the present one are seen; None for all of them."""
        return None

    def response(self, length: int) -> Tensor:
        """The taps that are applied to a sequence of `length` tokens, normalised where that is asked for."""
        kernel = self.generate(length)
        if not self.layout.norm:
            return kernel
        # The sum of a training sequence's taps whatever the length: or what is read would change with what comes after it.
        summed = kernel if self.train_length in (None, length) else self.generate(self.train_length)
        total = summed.abs().sum((-2, -1) if self.layout.sharing == "mixing" else -1, keepdim=True)
        return kernel / total.clamp(min=min_norm(kernel.dtype))

    def forward(self, x: Heads, positions: Positions | None = None) -> Queries:
        """The outputs at every position, or at positions `at`."""
        kernel = self.response(x.shape[2])
        match self.layout.sharing:
            case "head" if positions is not None and is_sparse(x, positions):
                return self.add_bias(filter_heads_at(x, kernel, positions, dilation=self.dilation))
            case "head":
                y = filter_heads(x, kernel, dilation=self.dilation)
            case "channel":
                y = filter_channels(x, kernel, dilation=self.dilation)
            case _:
                y = mix_heads(x, kernel, dilation=self.dilation)
        return self.add_bias(gather_positions(y, positions))

    def extra_repr(self) -> str:
        said = [f"{name}={w.shape[-1]}" for name, w in self.named_parameters() if name in ("taps", "coefficients")]
        if self.dilation > 1:
            said.append(f"dilation={self.dilation}")
        return ", ".join([*said, f"sharing={self.layout.sharing}"])

    def add_bias(self, y: Queries) -> Queries:
        return y if self.bias is None else y + self.bias

    def at_block_ends(self, x: Heads, block: int) -> Float[Tensor, "B H N C"]:
        """The outputs at the last tokens of the N whole blocks alone.

        The first tokens of all blocks are a sequence of N, the second ones another: an output is a sum over `block` sequences.
        """
        blocks = x.shape[2] // block
        if blocks == 0:
            return x[:, :, :0]
        kernel = dilate(self.response(x.shape[2]), self.dilation)[..., : blocks * block]
        kernel = F.pad(kernel, (0, -kernel.shape[-1] % block)).unflatten(-1, (-1, block)).flip(-1).mT
        tokens = x[:, :, : blocks * block].unflatten(2, (blocks, block)).transpose(2, 3).flatten(1, 2)
        match self.layout.sharing:
            case "head":
                y = filter_heads(tokens, kernel.flatten(0, 1)).unflatten(1, (-1, block)).sum(2)
            case "channel":
                y = filter_channels(tokens, kernel.transpose(1, 2).flatten(0, 1)).unflatten(1, (-1, block)).sum(2)
            case _:
                y = mix_heads(tokens, kernel.flatten(1, 2))
        return self.add_bias(y)

    def step(self, x: Heads, before: Float[Tensor, "B H R C"]) -> tuple[Heads, Float[Tensor, "B H S C"]]:
        """The outputs of tokens that follow upon those `before`, and the last rows, as many as those that come next will see.

        A filter that reaches back to the first token keeps all rows, whatever generates its taps, and is applied to all of them.
        """
        whole = torch.cat([before, x], dim=2)
        length = whole.shape[2]
        kept = length if self.reach is None else min(self.reach, length)
        y = self.last_output(whole) if x.shape[2] == 1 else self(whole)[:, :, length - x.shape[2] :]
        return y, whole[:, :, length - kept :]

    def last_output(self, x: Heads) -> Float[Tensor, "B H 1 C"]:
        """The output of the last token alone: one product of the taps with the tokens that they reach."""
        length = x.shape[2]
        kernel = self.response(length)[..., : -(-length // self.dilation)].flip(-1)
        reached = x[:, :, length - 1 - (kernel.shape[-1] - 1) * self.dilation :: self.dilation]
        match self.layout.sharing:
            case "head":
                y = kernel[:, None] @ reached
            case "channel":
                y = (autocast_to_compute_dtype(kernel).mT * autocast_to_compute_dtype(reached)).sum(2, keepdim=True)
            case _:
                y = (kernel.flatten(1) @ reached.flatten(1, 2))[:, :, None]
        return self.add_bias(y)

    def _initial(self, size: int, init: Init) -> tuple[Tensor, Tensor]:
        """`size` random numbers a row, and what tap 0 has besides them: little beside the identity, or all there is."""
        rows = self.layout.rows
        numbers = torch.randn(*rows, size) / math.sqrt(size)
        return (numbers, torch.zeros(rows)) if init == "random" else (0.1 * numbers, self._identity())

    def _identity(self) -> Tensor:
        """Tap 0 of the filter that changes nothing."""
        rows = self.layout.rows
        return torch.eye(*rows) if self.layout.sharing == "mixing" else torch.ones(rows)


class ExplicitFilter(Filter):
    """`width` taps that are weights, `dilation` tokens apart."""

    def __init__(self, layout: Layout, width: int, *, init: Init, dilation: int = 1):
        super().__init__(layout)
        self.dilation = dilation
        kernel, direct = self._initial(width, init)
        kernel[..., 0] += direct
        self.kernel = nn.Parameter(kernel)

    @torch.no_grad()
    def init_moving_sum(self, tokens: int) -> None:
        """Begins as the sum of what taps there are on the last `tokens`, and a little noise, where it began as the identity."""
        self.kernel[..., 1 : -(-tokens // self.dilation)] += self._identity()[..., None]

    def generate(self, length: int) -> Tensor:
        return self.kernel

    @property
    def reach(self) -> int:
        return (self.kernel.shape[-1] - 1) * self.dilation


class DecayFilter(Filter):
    """Exponential decays: `size` coefficients a row, over fixed decays or over learned ones, which make it a state space."""

    log_rate: Tensor

    def __init__(self, layout: Layout, size: int, *, init: Init, length: int, learned: bool):
        super().__init__(layout)
        self.train_length = length
        coefficients, direct = self._initial(size, init)
        self.coefficients, self.direct = nn.Parameter(coefficients), nn.Parameter(direct)
        log_rate = -time_scales(size, length).log()
        if learned:
            self.log_rate = nn.Parameter(log_rate.repeat(*self.layout.rows, 1))
        else:
            self.register_buffer("log_rate", log_rate)

    def generate(self, length: int) -> Tensor:
        ages = torch.arange(length, device=self.coefficients.device)
        decays = torch.exp(-ages * self.log_rate.exp()[..., None])
        kernel = (self.coefficients[..., None] * decays).sum(-2)
        return kernel + F.pad(self.direct[..., None], (0, length - 1))


class NetworkFilter(Filter):
    """Taps that a small network with `size` hidden units computes from how far back they are; they fade at a learned rate."""

    scales: Tensor

    def __init__(self, layout: Layout, size: int, *, init: Init, length: int):
        super().__init__(layout)
        self.train_length = length
        coefficients, direct = self._initial(size, init)
        self.coefficients, self.direct = nn.Parameter(coefficients), nn.Parameter(direct)
        self.frequencies = nn.Parameter(math.pi * torch.randn(FEATURES, size))
        self.phases = nn.Parameter(math.pi * torch.rand(size))
        self.log_fading = nn.Parameter(torch.full(self.layout.rows, -math.log(length)))
        self.register_buffer("scales", time_scales(FEATURES, length))

    def generate(self, length: int) -> Tensor:
        ages = torch.arange(length, device=self.scales.device)
        features = torch.exp(-ages[:, None] / self.scales)
        hidden = torch.sin(features @ self.frequencies + self.phases)
        kernel = self.coefficients @ hidden.mT * torch.exp(-ages * self.log_fading.exp()[..., None])
        return kernel + F.pad(self.direct[..., None], (0, length - 1))


def can_group(one: Filter, other: Filter, x: Float[Tensor, "B L _"]) -> bool:
    """Whether both are for `apply_together` on tokens such as these: with as many taps, and few."""
    if one.layout.sharing == "mixing" or not isinstance(one, ExplicitFilter) or not isinstance(other, ExplicitFilter):
        return False
    channels = one.layout.heads * one.layout.channels
    return one.kernel.shape == other.kernel.shape and is_short(x, one.kernel, channels, dilation=one.dilation)


def apply_grouped(filters: Sequence[Filter], x: GroupedHeads, positions: Positions | None = None) -> list[Queries]:
    """What filters that are alike make of their streams, one of which each has; of a single one, at positions `at` alone."""
    length, first = x.shape[3], filters[0]
    if len(filters) == 1:
        return [first(x.squeeze(0), positions)]
    kernel = torch.stack([causal.response(length) for causal in filters])
    kernel = kernel[:, :, None] if first.layout.sharing == "head" else kernel
    outputs = filter_groups(x, kernel, dilation=first.dilation)
    return [causal.add_bias(y) for causal, y in zip(filters, outputs, strict=True)]


def time_scales(count: int, length: int) -> Tensor:
    """`count` times in tokens, from 1 to `length` in equal ratios."""
    return torch.logspace(0, math.log2(length), count, base=2)


def build_filter(
    layout: Layout, kernel: KernelSize, *, init: Init, length: int, dilation: int = 1, size: int | None = None
) -> Filter:
    """The filter that a configuration names by its `taps`, for a model that is trained on `length` tokens."""
    match kernel:
        case int():
            return ExplicitFilter(layout, kernel, init=init, dilation=dilation)
        case "full":
            return ExplicitFilter(layout, length, init=init)
    assert size is not None
    if kernel == "network":
        return NetworkFilter(layout, size, init=init, length=length)
    return DecayFilter(layout, size, init=init, length=length, learned=kernel == "state")
