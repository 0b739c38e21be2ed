"""Causal filters: convolution kernels, explicit or generated, and their sharing.

    explicit   F_j is a weight, for j < W
    decay      F_j = sum_n c_n a_n^j + d [j = 0]          a fixed: time constants (to 1/e) from 1 token to a training length
    state      the same with a = exp(-exp(r)) learned     a diagonal state space, h_t = a h_{t-1} + x_t, y_t = <c, h_t> + d x_t
    network    F_j = e^{-w j} <c, sin(U f(j) + b)> + d [j = 0]     f(j)_m = exp(-j / s_m): an implicit filter (arXiv 2302.10866)

All but the first generate a kernel of any length. State-space filters are open question 2 of arXiv 2407.05591.
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

from cat.config import FilterInit, KernelSize
from cat.ops.common import autocast_to_compute_dtype, set_values
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
"""Number of time scales that encode the lag j for the network of an implicit filter."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Shape of a filter's input, and how its kernel is shared and normalized."""

    heads: int
    channels: int
    """Channels per head."""
    sharing: Literal["head", "channel", "mixing"] = "head"
    norm: bool = False
    """Divide the kernel by the sum of its absolute values; for a generated kernel, the sum over the training length."""
    bias: bool = False
    residual: bool = False
    """Add the input to the output: add the identity to the kernel, after its norm."""

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        """Shape of the kernel without its length.

        (H,) per head, (H, C) per channel, (H, H) from every head to every head.
        """
        return {"head": (self.heads,), "channel": (self.heads, self.channels), "mixing": (self.heads, self.heads)}[self.sharing]


class Filter(nn.Module, ABC):
    """Map (B, H, L, C) to (B, H, L, C): convolve, and add the bias if there is one.

    A subclass defines the kernel.
    """

    dilation = 1
    train_length: int | None = None
    """Training length, for generated kernels."""

    def __init__(self, layout: Layout):
        super().__init__()
        self.layout = layout
        self.bias = nn.Parameter(torch.empty(layout.heads, 1, layout.channels)) if layout.bias else None

    def reset_parameters(self) -> None:
        """Initialize the filter's own parameters and buffers; a subclass adds its own."""
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @abstractmethod
    def generate(self, length: int) -> Tensor:
        """Return the kernel (*kernel_shape, W) for a sequence of `length` tokens."""

    @property
    def reach(self) -> int | None:
        """Number of earlier tokens that an output depends on; None for all."""
        return None

    def response(self, length: int) -> Tensor:
        """Return the kernel for `length` tokens: normalized if configured, then with the identity added if configured."""
        kernel = self._normalized(length)
        if not self.layout.residual:
            return kernel
        return kernel + F.pad(self._identity().to(kernel)[..., None], (0, kernel.shape[-1] - 1))

    def _normalized(self, length: int) -> Tensor:
        kernel = self.generate(length)
        if not self.layout.norm:
            return kernel
        # The norm is taken at the training length: at the sequence length, outputs would depend on the number of later tokens.
        train_kernel = kernel
        # A compiled graph is for all lengths, so it does not ask whether this is the training length.
        if self.train_length is not None and (torch.compiler.is_compiling() or self.train_length != length):
            train_kernel = self.generate(self.train_length)
        total = train_kernel.abs().sum((-2, -1) if self.layout.sharing == "mixing" else -1, keepdim=True)
        return kernel / total.clamp(min=min_norm(kernel.dtype))

    def kernel_for(self, x: Float[Tensor, "*batch L C"]) -> Tensor:
        """Return the kernel for a sequence like `x`, in its dtype: a layer in bfloat16 may keep its kernels in float32."""
        return self.response(x.shape[-2]).to(x.dtype)

    def forward(self, x: Heads, positions: Positions | None = None) -> Queries:
        """Return the outputs at every position, or at `positions`."""
        kernel = self.kernel_for(x)
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
        labels = {"kernel": "kernel_size", "coefficients": "coefficients"}
        settings = [f"{labels[name]}={w.shape[-1]}" for name, w in self.named_parameters() if name in labels]
        if self.dilation > 1:
            settings.append(f"dilation={self.dilation}")
        return ", ".join([*settings, f"sharing={self.layout.sharing}"])

    def add_bias(self, y: Queries) -> Queries:
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def at_block_ends(self, x: Heads, block: int) -> Float[Tensor, "B H N C"]:
        """Return the outputs only at the last tokens of the N whole blocks.

        The first tokens of all blocks form one sequence of length N, the second tokens another. Each output is a sum of
        convolutions over these `block` sequences.
        """
        blocks = x.shape[2] // block
        if blocks == 0:
            return x[:, :, :0]
        kernel = dilate(self.kernel_for(x), self.dilation)[..., : blocks * block]
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

    def step(self, x: Heads, previous: Float[Tensor, "B H R C"]) -> tuple[Heads, Float[Tensor, "B H S C"]]:
        """Return the outputs of `x` after the inputs `previous`, and the inputs to cache.

        A filter with unlimited reach caches all inputs and is applied to all of them, whatever generates its kernel.
        """
        whole = torch.cat([previous, x], dim=2)
        length = whole.shape[2]
        cached = length if self.reach is None else min(self.reach, length)
        y = self.last_output(whole) if x.shape[2] == 1 else self(whole)[:, :, length - x.shape[2] :]
        return y, whole[:, :, length - cached :]

    def last_output(self, x: Heads) -> Float[Tensor, "B H 1 C"]:
        """Return only the last output: the product of the kernel with its inputs."""
        length = x.shape[2]
        kernel = self.kernel_for(x)[..., : -(-length // self.dilation)].flip(-1)
        inputs = x[:, :, length - 1 - (kernel.shape[-1] - 1) * self.dilation :: self.dilation]
        match self.layout.sharing:
            case "head":
                y = kernel[:, None] @ inputs
            case "channel":
                y = (autocast_to_compute_dtype(kernel).mT * autocast_to_compute_dtype(inputs)).sum(2, keepdim=True)
            case _:
                y = (kernel.flatten(1) @ inputs.flatten(1, 2))[:, :, None]
        return self.add_bias(y)

    def _initial(self, size: int, init: FilterInit) -> tuple[Tensor, Tensor]:
        """Draw random coefficients (*kernel_shape, size) and the identity to add to them, at lag 0.

        For the identity, the coefficients are small noise; for "random", they are the whole kernel, and the addition is zero.
        """
        shape = self.layout.kernel_shape
        noise = torch.randn(*shape, size) / math.sqrt(size)
        return (noise, torch.zeros(shape)) if init == "random" else (0.1 * noise, self._identity())

    def _input_at_start(self, init: FilterInit) -> Tensor | float:
        """Return the initial identity that `residual` already adds."""
        return self._identity() if self.layout.residual and init == "identity" else 0.0

    def _identity(self) -> Tensor:
        """Return the kernel value at lag 0 of the identity filter."""
        shape = self.layout.kernel_shape
        return torch.eye(*shape) if self.layout.sharing == "mixing" else torch.ones(shape)


class ExplicitFilter(Filter):
    """A learned kernel of `kernel_size` values, `dilation` tokens apart.

    `init_sum`: number of tokens in the moving sum that replaces the identity. With dilation, the sum has the tokens that the
    kernel covers.
    """

    def __init__(self, layout: Layout, kernel_size: int, *, init: FilterInit, dilation: int = 1, init_sum: int = 1):
        super().__init__(layout)
        self.dilation, self.init, self.init_sum = dilation, init, init_sum
        self.kernel = nn.Parameter(torch.empty(*layout.kernel_shape, kernel_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        set_values(self.kernel, self._initial_kernel(self.kernel.shape[-1]))
        if self.init == "uniform" and self.bias is not None:  # as nn.Conv1d
            set_values(self.bias, torch.empty(self.bias.shape).uniform_(-self._bound, self._bound))

    @property
    def _bound(self) -> float:
        """Largest initial value of nn.Conv1d."""
        inputs = self.kernel.shape[-1] * (self.layout.heads if self.layout.sharing == "mixing" else 1)
        return 1 / math.sqrt(inputs)

    def _initial_kernel(self, size: int) -> Tensor:
        shape = self.layout.kernel_shape
        match self.init:
            case "uniform":
                return torch.empty(*shape, size).uniform_(-self._bound, self._bound)
            case "shift":
                now = torch.rand(shape)
                return torch.stack([now, 1 - now], dim=-1)
            case "primer":
                return F.pad(torch.full((*shape, 1), 0.5), (0, size - 1), value=0.5 / size)
        kernel, direct = self._initial(size, self.init)
        kernel[..., : -(-self.init_sum // self.dilation)] += direct[..., None]
        kernel[..., 0] -= self._input_at_start(self.init)
        return kernel

    def generate(self, length: int) -> Tensor:
        return self.kernel

    @property
    def reach(self) -> int:
        return (self.kernel.shape[-1] - 1) * self.dilation


class DecayFilter(Filter):
    """A kernel that is a sum of `size` exponential decays, fixed or learned.

    With learned decays, it is a diagonal state space.
    """

    log_rate: Tensor
    train_length: int

    def __init__(self, layout: Layout, size: int, *, init: FilterInit, length: int, learned: bool):
        super().__init__(layout)
        self.init, self.train_length = init, length
        shape = layout.kernel_shape
        self.coefficients, self.direct = nn.Parameter(torch.empty(*shape, size)), nn.Parameter(torch.empty(shape))
        if learned:
            self.log_rate = nn.Parameter(torch.empty(*shape, size))
        else:
            self.register_buffer("log_rate", torch.empty(size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        size = self.coefficients.shape[-1]
        coefficients, direct = self._initial(size, self.init)
        set_values(self.coefficients, coefficients)
        set_values(self.direct, direct - self._input_at_start(self.init))
        set_values(self.log_rate, -time_scales(size, self.train_length).log().expand(self.log_rate.shape))

    def generate(self, length: int) -> Tensor:
        lags = torch.arange(length, device=self.coefficients.device)
        decays = torch.exp(-lags * self.log_rate.exp()[..., None])
        kernel = (self.coefficients[..., None] * decays).sum(-2)
        return kernel + F.pad(self.direct[..., None], (0, length - 1))


class NetworkFilter(Filter):
    """A kernel that a network with `size` hidden units computes from the lag.

    It is multiplied by a learned exponential decay.
    """

    scales: Tensor
    train_length: int

    def __init__(self, layout: Layout, size: int, *, init: FilterInit, length: int):
        super().__init__(layout)
        self.init, self.train_length = init, length
        shape = layout.kernel_shape
        self.coefficients, self.direct = nn.Parameter(torch.empty(*shape, size)), nn.Parameter(torch.empty(shape))
        self.frequencies, self.phases = nn.Parameter(torch.empty(FEATURES, size)), nn.Parameter(torch.empty(size))
        self.log_fading = nn.Parameter(torch.empty(shape))
        self.register_buffer("scales", torch.empty(FEATURES))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        size = len(self.phases)
        coefficients, direct = self._initial(size, self.init)
        set_values(self.coefficients, coefficients)
        set_values(self.direct, direct - self._input_at_start(self.init))
        set_values(self.frequencies, math.pi * torch.randn(FEATURES, size))
        set_values(self.phases, math.pi * torch.rand(size))
        nn.init.constant_(self.log_fading, -math.log(self.train_length))
        set_values(self.scales, time_scales(FEATURES, self.train_length))

    def generate(self, length: int) -> Tensor:
        lags = torch.arange(length, device=self.scales.device)
        features = torch.exp(-lags[:, None] / self.scales)
        hidden = torch.sin(features @ self.frequencies + self.phases)
        kernel = self.coefficients @ hidden.mT * torch.exp(-lags * self.log_fading.exp()[..., None])
        return kernel + F.pad(self.direct[..., None], (0, length - 1))


def can_group(first: Filter, second: Filter, x: Float[Tensor, "B L _"]) -> bool:
    """Whether `apply_grouped` can apply both filters to an input like `x`.

    Both need explicit kernels of the same, short shape, and equally wide heads.
    """
    if first.layout.sharing == "mixing" or not isinstance(first, ExplicitFilter) or not isinstance(second, ExplicitFilter):
        return False
    if first.layout.channels != second.layout.channels:
        return False
    channels = first.layout.heads * first.layout.channels
    return first.kernel.shape == second.kernel.shape and is_short(x, first.kernel, channels, dilation=first.dilation)


def apply_grouped(filters: Sequence[Filter], x: GroupedHeads, positions: Positions | None = None) -> list[Queries]:
    """Apply each filter to its projection in one call.

    `positions` are only used for a single filter. All filters satisfy `can_group` with each other.
    """
    first = filters[0]
    if len(filters) == 1:
        return [first(x.squeeze(0), positions)]
    kernel = torch.stack([filter_.kernel_for(x) for filter_ in filters])
    kernel = kernel[:, :, None] if first.layout.sharing == "head" else kernel
    outputs = filter_groups(x, kernel, dilation=first.dilation)
    return [filter_.add_bias(y) for filter_, y in zip(filters, outputs, strict=True)]


def time_scales(count: int, length: int) -> Tensor:
    """Return `count` time constants in tokens, log-spaced from 1 to `length`."""
    return torch.logspace(0, math.log2(length), count, base=2)


def build_filter(
    layout: Layout,
    kernel_size: KernelSize,
    *,
    init: FilterInit,
    length: int,
    dilation: int = 1,
    size: int | None = None,
    init_sum: int = 1,
) -> Filter:
    """Build the filter of a configured kernel size or generator.

    `length` is the training length. `size` is required for generated kernels: hidden units of a network, or number of decays.
    `init_sum` is for explicit kernels.
    """
    match kernel_size:
        case int():
            return ExplicitFilter(layout, kernel_size, init=init, dilation=dilation, init_sum=init_sum)
        case "full":
            return ExplicitFilter(layout, length, init=init, init_sum=init_sum)
    assert size is not None
    if kernel_size == "network":
        return NetworkFilter(layout, size, init=init, length=length)
    return DecayFilter(layout, size, init=init, length=length, learned=kernel_size == "state")
