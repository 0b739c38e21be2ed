"""Landmark attention against dense attention, by length."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from benchmarks.measure import Benchmark, Case, compared, normal, passes, same_shapes
from cat.mixers.landmark.op import block_ends, landmark_attend
from cat.ops.attention import attend

CHANNELS, TOP = 64, 2
TARGET = {"cpu": (5, 16384), "cuda": (3, 65536)}
"""How many times as fast at which length."""


def landmark(*, shortest: int = 1024, longest: int | None = None) -> Benchmark:
    """One sequence, one head; in blocks of about the square root of its length, two of them read by each query."""

    def cases(device: str) -> list[Case]:
        times, at = TARGET[device]
        scale, end = CHANNELS**-0.5, longest or {"cpu": 32768, "cuda": 65536}[device]
        lengths = [shortest << n for n in range((end // shortest).bit_length())]
        return [
            Case(
                name=f"{length:,} tokens in blocks of {block_of(length)}",
                ours=partial(passes, partial(landmarks, scale=scale, block=block_of(length)), partial(streams, length)),
                other=partial(passes, partial(attend, scale=scale), partial(streams, length)),
                sides=("landmark", "dense"),
                target=times if length == at else None,
                agree=same_shapes,  # a query reads three blocks of many
                count=(length, "tokens"),
            )
            for length in lengths
        ]

    return Benchmark(
        what="Landmark attention, forward and backward, against dense attention",
        target=", ".join(
            f"{times} times as fast at {at:,} tokens on {name}"
            for (times, at), name in zip(TARGET.values(), ("a CPU", "a GPU"), strict=True)
        ),
        figures=compared(cases),
    )


def block_of(length: int) -> int:
    """Tokens of a block: the power of two at or below the square root, where landmarks and blocks cost alike."""
    return 1 << (length.bit_length() - 1) // 2


def streams(length: int) -> list[Tensor]:
    return normal(*[(1, 1, length, CHANNELS)] * 3)


def landmarks(q: Tensor, k: Tensor, v: Tensor, *, scale: float, block: int) -> Tensor:
    return landmark_attend(q, k, v, block_ends(k, block), scale=scale, block=block, top=TOP, reach=3)
