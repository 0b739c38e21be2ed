"""Landmark attention against dense attention, at several lengths. Dense attention with a bias against a bias in memory."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import Benchmark, Case, compared, normal, passes, same_shapes
from cat.mixers.landmark.op import block_ends, landmark_attend
from cat.ops.attention import attend, relative_bias
from cat.ops.position import alibi_slopes

CHANNELS, TOP = 64, 2
TARGET = {"cpu": (5, 16384), "cuda": (3, 65536)}
"""Target speedup and the length at which it must be reached, per device."""
HEADS, WINDOW = 8, 256


def landmark(*, shortest: int = 1024, longest: int | None = None) -> Benchmark:
    """Measure one sequence with one head, in blocks of about the square root of its length; each query selects two blocks."""

    def cases(device: str) -> list[Case]:
        speedup, target_length = TARGET[device]
        scale, maximum = CHANNELS**-0.5, longest or {"cpu": 32768, "cuda": 65536}[device]
        lengths = [shortest << n for n in range((maximum // shortest).bit_length())]
        return [
            Case(
                name=f"{length:,} tokens in blocks of {block_of(length)}",
                ours=partial(passes, partial(landmarks, scale=scale, block=block_of(length)), partial(inputs, length)),
                other=partial(passes, partial(attend, scale=scale), partial(inputs, length)),
                sides=("landmark", "dense"),
                target=speedup if length == target_length else None,
                agree=same_shapes,  # a query attends to only three blocks
                count=(length, "tokens"),
            )
            for length in lengths
        ]

    return Benchmark(
        what="Landmark attention, forward and backward, against dense attention",
        target=", ".join(
            f"{speedup} times as fast at {length:,} tokens on {name}"
            for (speedup, length), name in zip(TARGET.values(), ("a CPU", "a GPU"), strict=True)
        ),
        figures=compared(cases),
    )


def biased(*, length: int = 4096, window: int = WINDOW) -> Benchmark:
    """Measure ALiBi and a sliding window. The peak memory shows whether a bias of length^2 values per head is stored."""

    def cases(device: str) -> list[Case]:
        options = {"ALiBi": {"alibi": True, "window": None}, f"window of {window}": {"alibi": False, "window": window}}
        return [
            Case(
                name=f"{name}, {length:,} tokens",
                ours=partial(passes, partial(without_bias, **option), partial(inputs, length, heads=HEADS)),
                other=partial(passes, partial(with_bias, **option), partial(inputs, length, heads=HEADS)),
                sides=("view", "bias in memory"),
                target=1.2 if device == "cpu" else None,
                count=(length, "tokens"),
            )
            for name, option in options.items()
        ]

    return Benchmark(
        what="Dense attention with ALiBi or a window, forward and backward, against a bias in memory",
        target=f"1.2 times as fast at {length:,} tokens on a CPU",
        figures=compared(cases),
    )


def without_bias(q: Tensor, k: Tensor, v: Tensor, *, alibi: bool, window: int | None) -> Tensor:
    slopes = alibi_slopes(q.shape[1], q) if alibi else None
    return attend(q, k, v, scale=CHANNELS**-0.5, slopes=slopes, window=window)


def with_bias(q: Tensor, k: Tensor, v: Tensor, *, alibi: bool, window: int | None) -> Tensor:
    positions = torch.arange(q.shape[2], device=q.device)
    distance = (positions[:, None] - positions).flatten()
    bias = relative_bias(distance, q, slopes=alibi_slopes(q.shape[1], q) if alibi else None, window=window)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.view(1, -1, *2 * positions.shape), scale=CHANNELS**-0.5)


def block_of(length: int) -> int:
    """Block size: the largest power of two up to the square root of `length`, where landmarks and blocks cost the same."""
    return 1 << (length.bit_length() - 1) // 2


def inputs(length: int, *, heads: int = 1) -> list[Tensor]:
    return normal(*[(1, heads, length, CHANNELS)] * 3)


def landmarks(q: Tensor, k: Tensor, v: Tensor, *, scale: float, block: int) -> Tensor:
    return landmark_attend(q, k, v, block_ends(k, block), scale=scale, block=block, top=TOP, reach=3)
