"""Benchmark generation: a step with a cache compared with a full forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.measure import Benchmark, Case, Work, compared
from cat.config import ModelConfig
from cat.mixers.base import Cache
from cat.mixers.registry import model_config
from cat.model import SequenceModel

VOCABULARY, TARGET = 256, 10


def generation(*, length: int = 1024, width: int = 256) -> Benchmark:
    """One sequence, four layers; kernel size 4 on q, k and v of mixers with them."""
    sizes = {"width": width, "layers": 4, "mlp": 4}
    qkv = {**sizes, "heads": 4, "conv_q": 4, "conv_k": 4, "conv_v": 4}
    configs = {
        "CAT": model_config(mixer="attention", **qkv),
        "LinCAT": model_config(mixer="linear", **qkv),
        "Gated DeltaNet": model_config(mixer="delta", gate=True, **qkv),
        "Mamba": model_config(mixer="mamba", **sizes),
    }
    cases = [
        Case(
            name=f"{name}, after {length:,} tokens",
            ours=partial(step, config, length),
            other=partial(forward, config, length),
            sides=("cached step", "full forward pass"),
            target=TARGET,
            count=(1, "tokens"),
        )
        for name, config in configs.items()
    ]
    return Benchmark(
        what="Generation: a cached step compared with a full forward pass per token",
        target=f"{TARGET} times as fast after {length:,} tokens",
        figures=compared(lambda device: cases),
    )


def step(config: ModelConfig, length: int, device: str) -> Work:
    model, tokens = build(config, length, device)
    with torch.no_grad():
        _, caches = model.step(tokens[:, :-1])
    return partial(_step, model, tokens[:, -1:], caches)


@torch.no_grad()
def _step(model: SequenceModel, token: Tensor, caches: Sequence[Cache]) -> Tensor:
    return model.step(token, caches)[0]


def forward(config: ModelConfig, length: int, device: str) -> Work:
    return partial(_forward, *build(config, length, device))


@torch.no_grad()
def _forward(model: SequenceModel, tokens: Tensor) -> Tensor:
    return model(tokens)[:, -1]


def build(config: ModelConfig, length: int, device: str) -> tuple[SequenceModel, Tensor]:
    """Return a model with the same weights at every call, and `length` + 1 tokens."""
    torch.manual_seed(0)
    model = SequenceModel(config, vocabulary=VOCABULARY, length=length).to(device)
    generator = torch.Generator().manual_seed(0)
    return model, torch.randint(VOCABULARY, (1, length + 1), generator=generator).to(device)
