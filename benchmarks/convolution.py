"""Filters: what they add to a layer, and the convolution itself beside PyTorch's, short and as long as the sequence."""

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

TAPS = 4
COST_TARGET = {"cpu": 1.2, "cuda": 1.1}
POWER_TARGET = 1.25
"""L log L itself is L to the power of 1.1 at these lengths."""

Operation = Callable[[Heads, Tensor], Heads]


def filters(length: int, *, tokens: int = 8192, sizes: Sequence[tuple[int, int]] = ((64, 1), (256, 4))) -> Benchmark:
    """A layer of CAT against the same layer without filters; the filters are the identity, so that both compute the same."""

    def cases(device: str) -> list[Case]:
        batch = max(1, tokens // length)
        return [
            Case(
                name=f"batch {batch}, width {width}, {heads} {'head' if heads == 1 else 'heads'}",
                ours=partial(layer, width, heads, length, batch, {"q": TAPS, "k": TAPS, "v": TAPS}),
                other=partial(layer, width, heads, length, batch, {}),
                sides=("filters on q, k, v", "no filters"),
                unit=COST,
                target=COST_TARGET[device],
                replay=True,
                count=(batch * length, "tokens"),
            )
            for width, heads in sizes
        ]

    return Benchmark(
        what=f"A layer of attention with {TAPS} taps on q, k and v, {length:,} tokens, against the layer without",
        target=f"{COST_TARGET['cpu']:g} times the time, {COST_TARGET['cuda']:g} on a GPU",
        figures=compared(cases),
    )


def layer(width: int, heads: int, length: int, batch: int, taps: dict[str, Any], device: str) -> Work:
    """A forward and backward pass of the layer: its output, and the gradients of the input and of both projections."""
    config = AttentionConfig(mixer="attention", width=width, layers=1, heads=heads, position="none", **taps)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mixer = CausalAttention(config, length)
    with torch.no_grad():
        for weight in mixer.filters.parameters():
            weight.zero_()[..., 0] = 1
    mixer.to(device)
    x, gradient = (tensor.to(device) for tensor in normal((batch, length, width), (batch, length, width)))
    leaves = [x.requires_grad_(), mixer.projection.weight, mixer.output.weight, *mixer.filters.parameters()]

    def work() -> list[Tensor]:
        y = mixer(x)
        return [y.detach(), *torch.autograd.grad(y, leaves, gradient)][:4]

    return work


def short_convolution(*, batch: int = 8, length: int = 1024, naive_length: int = 32, channels: int = 64) -> Benchmark:
    """One filter a head and one a channel, over four heads as a projection leaves them: a view of (B, L, D)."""
    heads = 4
    kinds: dict[str, tuple[Operation, Operation, tuple[int, ...]]] = {
        "a head": (filter_heads, naive_filter_heads, (heads, TAPS)),
        "a channel": (filter_channels, naive_filter_channels, (heads, channels, TAPS)),
    }

    def cases(device: str) -> list[Case]:
        others = [("conv1d", depthwise, length)]
        if device == "cuda" and causal_conv1d() is not None:
            others.append(("causal-conv1d", fused, length))
        return [
            Case(
                name=f"a filter {kind}, batch {batch}, {size:,} tokens, width {heads * channels}",
                ours=partial(passes, ours, partial(stream, batch, size, heads, channels, rows)),
                other=partial(passes, other, partial(stream, batch, size, heads, channels, rows)),
                sides=("this project", name),
                target=1,
                replay=True,
            )
            for kind, (ours, naive, rows) in kinds.items()
            for name, other, size in [("naive twin", naive, naive_length), *others]
        ]

    return Benchmark(
        what=f"A causal filter of {TAPS} taps, forward and backward, against its naive twin and PyTorch's depthwise convolution",
        target="ahead of all",
        figures=compared(cases),
    )


def stream(batch: int, length: int, heads: int, channels: int, rows: tuple[int, ...]) -> list[Tensor]:
    x, taps = normal((batch, length, heads, channels), rows)
    return [x.transpose(1, 2), taps]


def depthwise(x: Heads, taps: Tensor) -> Heads:
    """The filter by PyTorch's convolution, one group a channel."""
    rows, weight = _channels_first(x, taps)
    y = F.conv1d(F.pad(rows, (weight.shape[-1] - 1, 0)), weight[:, None], groups=len(weight))
    return y.unflatten(1, x.shape[1::2]).transpose(2, 3)


def fused(x: Heads, taps: Tensor) -> Heads:
    """The filter by the package causal-conv1d."""
    operation = causal_conv1d()
    assert operation is not None
    rows, weight = _channels_first(x, taps)
    return operation(rows, weight).unflatten(1, x.shape[1::2]).transpose(2, 3)


def causal_conv1d() -> Callable[..., Tensor] | None:
    try:
        return importlib.import_module("causal_conv1d").causal_conv1d_fn
    except ImportError:
        return None


def _channels_first(x: Heads, taps: Tensor) -> tuple[Tensor, Tensor]:
    """(B, D, L) as views and weights (D, W), the last tap first."""
    taps = taps if taps.dim() == 3 else taps[:, None].expand(-1, x.shape[3], -1)
    return x.transpose(2, 3).flatten(1, 2), taps.flatten(0, 1).flip(-1)


def long_convolution(*, direct: int = 16384, shortest: int = 4096, longest: int = 65536, channels: int = 16) -> Benchmark:
    """As many taps as tokens, a filter a channel: against the direct sum, then against itself at half the length."""

    def at(length: int, operation: Operation) -> Callable[[str], Work]:
        return partial(passes, operation, partial(stream, 1, length, 1, channels, (1, channels, length)))

    def cases(device: str) -> list[Case]:
        ahead = Case(
            name=f"{direct:,} tokens, {channels} channels; direct sums cost too much beyond",
            ours=at(direct, filter_channels),
            other=at(direct, depthwise),
            sides=("this project", "conv1d"),
            target=1,
        )
        lengths = [shortest << n for n in range((longest // shortest).bit_length())]
        growth = [
            Case(
                name=f"from {length:,} to {2 * length:,} tokens",
                ours=at(2 * length, filter_channels),
                other=at(length, filter_channels),
                sides=(f"{2 * length:,} tokens", f"{length:,} tokens"),
                unit=POWER,
                target=POWER_TARGET,
                agree=no_relation,
            )
            for length in lengths[:-1]
        ]
        return [ahead, *growth]

    return Benchmark(
        what="A causal filter with as many taps as tokens, forward and backward: against the direct sum, and how it grows",
        target=f"ahead, and time ~ L^p with p at most {POWER_TARGET:g}",
        figures=compared(cases),
    )


def no_relation(ours: Any, other: Any) -> None:
    """Two lengths have no outcome in common."""
