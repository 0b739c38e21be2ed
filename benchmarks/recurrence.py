"""Benchmark recurrences against reference implementations that loop over tokens, and their training against attention's."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import COST, Benchmark, Case, NotRun, Work, compared, normal, passes
from benchmarks.training import fit_step
from cat.evaluation.scores import Split
from cat.mixers.delta.op import delta_rule, naive_delta_rule
from cat.mixers.gla.op import gated_linear_attend, naive_gated_linear_attend
from cat.mixers.linear.op import linear_attend, naive_linear_attend
from cat.mixers.mamba.op import naive_selective_scan, selective_scan
from cat.mixers.registry import model_config
from cat.seeding import generator
from cat.tasks.recall import Recall
from cat.training.fit import build_model

TARGET, COST_TARGET = 20, 2
CAT_K: dict[str, Any] = {"mixer": "attention", "heads": 1, "position": "none", "qk_norm": True, "conv_k": 4}
DELTA: dict[str, Any] = {"mixer": "delta", "gate": True, "conv_q": 4, "conv_k": 4, "conv_v": 4, "sharing": "channel"}
RECURRENT: dict[str, dict[str, Any]] = {
    "Mamba, expand 1": {"mixer": "mamba", "expand": 1},
    "Mamba, expand 2": {"mixer": "mamba", "expand": 2},
    "gated linear attention": {"mixer": "gla", "heads": 1},
    "Gated DeltaNet": {**DELTA, "heads": 1},
    "Gated DeltaNet, 2 heads": {**DELTA, "heads": 2},
    "linear attention": {"mixer": "linear", "heads": 1, "position": "none"},
    "Performer": {"mixer": "performer", "features": 64, "heads": 1, "position": "none"},
    "Based": {"mixer": "based", "window": 8, "heads": 1, "position": "none"},
    "Mamba, then attention": {"mixer": ["mamba", "attention"], "layers": 2, "expand": 1, "heads": 1, "position": "none"},
    "Gated DeltaNet, then attention": {
        "mixer": ["delta", "attention"], "layers": 2, "gate": True, "heads": 1, "position": "none",
    },
}  # fmt: skip

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


def recurrent_steps(*, batch: int = 32, length: int = 36, names: Iterable[str] = RECURRENT) -> Benchmark:
    """Compare training steps at width 64 with those of CAT-K, attention with convolved keys."""

    def cases(device: str) -> list[Case]:
        if device == "cuda":
            raise NotRun("for a CPU")
        return [
            Case(
                name=f"{name}, batch {batch}, 8 pairs in {length} tokens, width 64",
                ours=partial(recall_step, RECURRENT[name], batch, length),
                other=partial(recall_step, CAT_K, batch, length),
                sides=(name, "CAT-K"),
                unit=COST,
                target=COST_TARGET,
                agree=lambda *losses: None,  # two different models
                count=(batch * length, "tokens"),
            )
            for name in names
        ]

    return Benchmark(
        what="A training step of recurrent mixers and hybrids, against one of attention with convolved keys",
        target=f"at most {COST_TARGET} times the time",
        figures=compared(cases),
    )


def recall_step(model: dict[str, Any], batch: int, length: int, device: str) -> Work:
    """Prepare the step of `fit` on associative recall, as in the task `ar` of the study."""
    task = Recall(
        kind="recall",
        ngram=1,
        keys=64,
        values=64,
        filler=1,
        pairs=8,
        queries="all",
        query_gap="uniform",
        length=length,
        multiples=(1,),
        train_examples=1,
        valid_examples=1,
        test_examples=1,
    )
    examples = task.examples("train", length, batch, generator(0, "benchmark", "train"))
    config = model_config(**{"width": 64, "layers": 1, **model})
    built = build_model(config, vocabulary=task.vocabulary, length=length, seed=0)
    return fit_step(built, Split.of(*map(torch.tensor, examples)).rows(slice(None)))


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
