"""Landmark attention against dense attention, at several lengths."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from benchmarks.measure import Benchmark, Case, compared, normal, passes, same_shapes
from cat.mixers.landmark.op import block_ends, landmark_attend
from cat.ops.attention import attend

CHANNELS, TOP = 64, 2
TARGET = {"cpu": (5, 16384), "cuda": (3, 65536)}
"""Target speedup and the length at which it must be reached, per device."""


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


def block_of(length: int) -> int:
    """Block size: the largest power of two up to the square root of `length`, where landmarks and blocks cost the same."""
    return 1 << (length.bit_length() - 1) // 2


def inputs(length: int) -> list[Tensor]:
    return normal(*[(1, 1, length, CHANNELS)] * 3)


def landmarks(q: Tensor, k: Tensor, v: Tensor, *, scale: float, block: int) -> Tensor:
    return landmark_attend(q, k, v, block_ends(k, block), scale=scale, block=block, top=TOP, reach=3)
