"""The next token from what is remembered of those before, against the full forward pass over all of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.measure import Benchmark, Case, Work, compared
from cat.mixers.attention.config import AttentionConfig
from cat.mixers.base import Cache
from cat.mixers.delta.config import DeltaConfig
from cat.mixers.linear.config import LinearConfig
from cat.mixers.mamba.config import MambaConfig
from cat.mixers.registry import AnyModel
from cat.model import SequenceModel

VOCABULARY, TARGET = 256, 10


def generation(*, length: int = 1024, width: int = 256) -> Benchmark:
    """One sequence, four layers; filters of four taps on queries, keys and values, where there are such."""
    sizes = {"width": width, "layers": 4, "mlp": 4}
    streams = {**sizes, "heads": 4, "position": "none", "q": 4, "k": 4, "v": 4}
    configs = {
        "CAT": AttentionConfig(mixer="attention", **streams),
        "LinCAT": LinearConfig(mixer="linear", **streams),
        "Gated DeltaNet": DeltaConfig(mixer="delta", gate=True, **streams),
        "Mamba": MambaConfig(mixer="mamba", **sizes),
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
        what="Generation: a cached step against the full forward pass a token",
        target=f"{TARGET} times as fast after {length:,} tokens",
        figures=compared(lambda device: cases),
    )


def step(config: AnyModel, length: int, device: str) -> Work:
    model, tokens = ready(config, length, device)
    with torch.no_grad():
        _, memories = model.step(tokens[:, :-1])
    return partial(_step, model, tokens[:, -1:], memories)


@torch.no_grad()
def _step(model: SequenceModel, token: Tensor, memories: Sequence[Cache]) -> Tensor:
    return model.step(token, memories)[0]


def forward(config: AnyModel, length: int, device: str) -> Work:
    return partial(_forward, *ready(config, length, device))


@torch.no_grad()
def _forward(model: SequenceModel, tokens: Tensor) -> Tensor:
    return model(tokens)[:, -1]


def ready(config: AnyModel, length: int, device: str) -> tuple[SequenceModel, Tensor]:
    """A model with the same weights at every call, and the tokens before and the last one."""
    torch.manual_seed(0)
    model = SequenceModel(config, vocabulary=VOCABULARY, length=length).to(device)
    generator = torch.Generator().manual_seed(0)
    return model, torch.randint(VOCABULARY, (1, length + 1), generator=generator).to(device)
