"""The example configurations of all mixers, and mixers with known weights."""

import torch
from torch import Tensor, nn

from cat.config import ModelConfig
from cat.mixers.build import build_mixer
from cat.mixers.registry import mixer_examples, mixer_names, model_config
from tests.helpers.reference import normal

BATCH, WIDTH, HEADS = 2, 18, 3
QKV = {"heads": HEADS}
EXAMPLES = {
    mixer if name == "plain" else f"{mixer}_{name}": {"mixer": mixer, **example.model_dump(exclude_unset=True)}
    for mixer in mixer_names()
    for name, example in mixer_examples(mixer).items()
}
"""Settings of every example of every mixer: `linear` is the one named `plain`, `linear_all` the one named `all`."""
ONE_PER_MIXER = [
    max((name for name in EXAMPLES if EXAMPLES[name]["mixer"] == mixer), key=lambda name: len(EXAMPLES[name]))
    for mixer in mixer_names()
]
"""The example of each mixer with the most keys."""


def configure(**settings: object) -> ModelConfig:
    return model_config(**{"width": WIDTH, "layers": 1, **settings})


def build(settings: dict[str, object], length: int) -> nn.Module:
    """Build a mixer in float64 with the same weights at every call."""
    config = configure(**settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build_mixer(config.mixers[0], width=config.width, length=length).double()


def assert_uniform(values: Tensor, low: float, high: float) -> None:
    """Compare quantiles with those of a uniform distribution; for a few thousand values or more."""
    shares = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0], dtype=torch.float64)
    found = (torch.quantile(values.detach().double().flatten()[:100_000], shares) - low) / (high - low)
    torch.testing.assert_close(found, shares, rtol=0, atol=0.04)
    assert low <= values.min().item()
    assert values.max().item() <= high


def hidden(length: int, seed: int = 0) -> Tensor:
    return normal(BATCH, length, WIDTH, seed=seed)
