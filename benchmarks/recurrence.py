"""Benchmark recurrences against reference implementations that loop over tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import Benchmark, Case, compared, normal, passes
from cat.mixers.delta.op import delta_rule, naive_delta_rule
from cat.mixers.gla.op import gated_linear_attend, naive_gated_linear_attend
from cat.mixers.linear.op import linear_attend, naive_linear_attend
from cat.mixers.mamba.op import naive_selective_scan, selective_scan

TARGET = 20

Operation = Callable[..., Tensor]


def scan(*, length: int = 1024, batch: int = 1) -> Benchmark:
    """Compare at width 64.

    The delta rule and linear attention have one head; the state space model has 128 channels of state size 16.
    """
    operations: dict[str, tuple[Operation, Operation, Callable[[int, int], list[Tensor]]]] = {
        "selective state space": (selective_scan, naive_selective_scan, state_space),
        "gated delta rule": (delta_rule, naive_delta_rule, gated),
        "gated linear attention": (
            partial(gated_linear_attend, scale=1 / 8),
            partial(naive_gated_linear_attend, scale=1 / 8),
            forgetting,
        ),
        "linear attention": (linear_attend, naive_linear_attend, plain),
    }
    cases = [
        Case(
            name=f"{name}, batch {batch}, {length:,} tokens",
            ours=partial(passes, ours, partial(inputs, batch, length)),
            other=partial(passes, naive, partial(inputs, batch, length)),
            sides=("this project", "token by token"),
            target=TARGET,
            count=(batch * length, "tokens"),
        )
        for name, (ours, naive, inputs) in operations.items()
    ]
    return Benchmark(
        what="Recurrences, forward and backward, compared with their definitions token by token",
        target=f"{TARGET} times as fast",
        figures=compared(lambda device: cases),
    )


def state_space(batch: int, length: int) -> list[Tensor]:
    channels, size = 128, 16
    x, step, b, c = normal((batch, length, channels), (batch, length, channels), (batch, length, size), (batch, length, size))
    rates = -torch.arange(1.0, size + 1).repeat(channels, 1)
    return [x, F.softplus(step - 3), rates, b, c]


def gated(batch: int, length: int) -> list[Tensor]:
    q, k, v, beta, step = normal(*[(batch, 1, length, 64)] * 3, *[(batch, 1, length)] * 2)
    return [F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, beta.sigmoid(), -F.softplus(step - 3)]


def forgetting(batch: int, length: int) -> list[Tensor]:
    q, k, v, gate = normal(*[(batch, 1, length, 64)] * 4)
    return [q, k, v, F.logsigmoid(gate) / 16]


def plain(batch: int, length: int) -> list[Tensor]:
    return normal(*[(batch, 1, length, 64)] * 3)
