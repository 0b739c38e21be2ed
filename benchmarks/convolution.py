"""The cost of convolutions in a layer, and the causal convolution against PyTorch's, with short and long kernels."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import COST, POWER, Benchmark, Case, Work, compared, normal, passes
from cat.mixers.attention.config import AttentionConfig
from cat.mixers.attention.layer import CausalAttention
from cat.ops.conv.causal import filter_channels, filter_heads
from cat.ops.conv.reference import naive_filter_channels, naive_filter_heads
from cat.types import Heads

KERNEL_SIZE = 4
COST_TARGET = {"cpu": 1.2, "cuda": 1.1}
POWER_TARGET = 1.25
"""At these lengths L log L itself grows as L^1.1."""

Operation = Callable[[Heads, Tensor], Heads]


def qkv_convolutions(length: int, *, tokens: int = 8192, sizes: Sequence[tuple[int, int]] = ((64, 1), (256, 4))) -> Benchmark:
    """Compare a CAT layer with the same layer without convolutions.

    The kernels are the identity, so that both layers compute the same.
    """

    def cases(device: str) -> list[Case]:
        batch = max(1, tokens // length)
        return [
            Case(
                name=f"batch {batch}, width {width}, {heads} {'head' if heads == 1 else 'heads'}",
                ours=partial(
                    layer, width, heads, length, batch, {"conv_q": KERNEL_SIZE, "conv_k": KERNEL_SIZE, "conv_v": KERNEL_SIZE}
                ),
                other=partial(layer, width, heads, length, batch, {}),
                sides=("convolved q, k, v", "no convolution"),
                unit=COST,
                target=COST_TARGET[device],
                replay=True,
                count=(batch * length, "tokens"),
            )
            for width, heads in sizes
        ]

    return Benchmark(
        what=f"An attention layer with convolved q, k, v (kernel size {KERNEL_SIZE}) against one without, {length:,} tokens",
        target=f"at most {COST_TARGET['cpu']:g} times the time, {COST_TARGET['cuda']:g} on a GPU",
        figures=compared(cases),
    )


def layer(width: int, heads: int, length: int, batch: int, convolutions: dict[str, Any], device: str) -> Work:
    """Run the forward and backward pass: the output, and the gradients of the input and of the projections."""
    config = AttentionConfig(heads=heads, **convolutions)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mixer = CausalAttention(config, width=width, length=length)
    with torch.no_grad():
        for weight in mixer.filters.parameters():
            weight.zero_()[..., 0] = 1
    mixer.to(device)
    x, gradient = (tensor.to(device) for tensor in normal((batch, length, width), (batch, length, width)))
    leaves = [x.requires_grad_(), *mixer.parameters()]

    def work() -> list[Tensor]:
        y = mixer(x)
        return [y.detach(), *torch.autograd.grad(y, leaves, gradient)][:6]

    return work


def short_convolution(*, batch: int = 8, length: int = 1024, naive_length: int = 32, channels: int = 64) -> Benchmark:
    """Measure one kernel per head and one per channel. The four heads are a view of (B, L, D), as after a projection."""
    heads = 4
    operations: dict[str, tuple[Operation, Operation, tuple[int, ...]]] = {
        "head": (filter_heads, naive_filter_heads, (heads, KERNEL_SIZE)),
        "channel": (filter_channels, naive_filter_channels, (heads, channels, KERNEL_SIZE)),
    }

    def cases(device: str) -> list[Case]:
        others = [("conv1d", depthwise, length)]
        if device == "cuda" and causal_conv1d() is not None:
            others.append(("causal-conv1d", fused, length))
        return [
            Case(
                name=f"one kernel per {sharing}, batch {batch}, {size:,} tokens, width {heads * channels}",
                ours=partial(passes, ours, partial(inputs, batch, size, heads, channels, shape)),
                other=partial(passes, other, partial(inputs, batch, size, heads, channels, shape)),
                sides=("this project", name),
                target=1,
                replay=True,
            )
            for sharing, (ours, naive, shape) in operations.items()
            for name, other, size in [("reference implementation", naive, naive_length), *others]
        ]

    return Benchmark(
        what=f"Causal convolution (kernel size {KERNEL_SIZE}), forward and backward, against its reference and PyTorch's conv1d",
        target="faster than all",
        figures=compared(cases),
    )


def inputs(batch: int, length: int, heads: int, channels: int, kernel_shape: tuple[int, ...]) -> list[Tensor]:
    x, kernel = normal((batch, length, heads, channels), kernel_shape)
    return [x.transpose(1, 2), kernel]


def depthwise(x: Heads, kernel: Tensor) -> Heads:
    """Convolve with PyTorch's conv1d, one group per channel."""
    flat, weight = _channels_first(x, kernel)
    y = F.conv1d(F.pad(flat, (weight.shape[-1] - 1, 0)), weight[:, None], groups=len(weight))
    return y.unflatten(1, x.shape[1::2]).transpose(2, 3)


def fused(x: Heads, kernel: Tensor) -> Heads:
    """Convolve with the package causal-conv1d."""
    operation = causal_conv1d()
    assert operation is not None
    flat, weight = _channels_first(x, kernel)
    return operation(flat, weight).unflatten(1, x.shape[1::2]).transpose(2, 3)


def causal_conv1d() -> Callable[..., Tensor] | None:
    try:
        return importlib.import_module("causal_conv1d").causal_conv1d_fn
    except ImportError:
        return None


def _channels_first(x: Heads, kernel: Tensor) -> tuple[Tensor, Tensor]:
    """Return x as (B, D, L), and the kernel as (D, W) with its last value first, as conv1d expects it."""
    kernel = kernel if kernel.dim() == 3 else kernel[:, None].expand(-1, x.shape[3], -1)
    return x.transpose(2, 3).flatten(1, 2), kernel.flatten(0, 1).flip(-1)


def long_convolution(*, direct: int = 16384, shortest: int = 4096, longest: int = 65536, channels: int = 16) -> Benchmark:
    """Measure one kernel per channel, as long as the sequence: against the direct sum, then against half the length."""

    def setup(length: int, operation: Operation) -> Callable[[str], Work]:
        return partial(passes, operation, partial(inputs, 1, length, 1, channels, (1, channels, length)))

    def cases(device: str) -> list[Case]:
        against_direct = Case(
            name=f"{direct:,} tokens, {channels} channels; direct sums are too slow for more",
            ours=setup(direct, filter_channels),
            other=setup(direct, depthwise),
            sides=("this project", "conv1d"),
            target=1,
        )
        lengths = [shortest << n for n in range((longest // shortest).bit_length())]
        growth = [
            Case(
                name=f"from {length:,} to {2 * length:,} tokens",
                ours=setup(2 * length, filter_channels),
                other=setup(length, filter_channels),
                sides=(f"{2 * length:,} tokens", f"{length:,} tokens"),
                unit=POWER,
                target=POWER_TARGET,
                agree=no_comparison,
            )
            for length in lengths[:-1]
        ]
        return [against_direct, *growth]

    return Benchmark(
        what="Causal convolution as long as the sequence, forward and backward, against the direct sum, and its growth",
        target=f"faster, and time ~ L^p with p at most {POWER_TARGET:g}",
        figures=compared(cases),
    )


def no_comparison(ours: Any, other: Any) -> None:
    """Results of two lengths cannot be compared."""
