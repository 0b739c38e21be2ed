"""Every mixer passes the checks of cat/mixers/checks.py on all its examples. Mixers in a model, and their sizes."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from cat.mixers.build import build_mixer
from cat.mixers.checks import CHECKS, FOLDER_CHECKS
from cat.mixers.registry import mixer_examples, mixer_names
from cat.model import SequenceModel
from tests.helpers.mixers import EXAMPLES, ONE_PER_MIXER, configure
from tests.helpers.reference import close, normal

CHECKED = [(mixer, example) for mixer in mixer_names() for example in mixer_examples(mixer)]


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize(("mixer", "example"), CHECKED)
def test_every_example_of_every_mixer_passes_every_check(mixer, example, check):
    CHECKS[check](mixer_examples(mixer)[example])


@pytest.mark.parametrize("check", [check for check in FOLDER_CHECKS if check != "compile"])
@pytest.mark.parametrize("mixer", mixer_names())
def test_every_folder_passes_every_check(mixer, check):
    FOLDER_CHECKS[check](mixer)


COMPILED = """
from cat.mixers.checks import FOLDER_CHECKS
from cat.mixers.registry import mixer_names
for mixer in mixer_names():
    FOLDER_CHECKS["compile"](mixer)
"""


@pytest.mark.long
def test_every_mixer_can_be_compiled():
    """In a process of its own: the compiler cannot trace the shape checks of the tests."""
    subprocess.run([sys.executable, "-c", COMPILED], check=True)


# Mixers in a model.


@pytest.mark.parametrize(
    ("name", "position"), [*((name, "none") for name in ONE_PER_MIXER), ("attention", "learned"), ("attention", "sinusoidal")]
)
@pytest.mark.parametrize("layers", [1, 3])
def test_a_model_projects_its_embeddings_if_tokens_are_many(name, position, layers):
    """Compare a model with a vocabulary of 5 on 29 tokens and the same model with 1,000 more, unused tokens."""
    config = configure(**EXAMPLES[name], mlp=2).model_copy(update={"layers": layers, "position": position})
    small, large = (SequenceModel(config, vocabulary=size, length=29).double() for size in (5, 1005))
    large.load_state_dict(
        {
            n: F.pad(w, (0, 0, 0, 1000)) if n in ("embedding.token.weight", "head.weight") else w
            for n, w in small.state_dict().items()
        }
    )
    tokens, positions = torch.randint(5, (2, 29), generator=torch.Generator().manual_seed(0)), torch.tensor([[3, 7], [0, 28]])
    projected = []
    for model in (small, large):
        first, project = model.blocks[0], model.blocks[0].project
        first.project = lambda x, *others, project=project: projected.append(x.shape[:-1]) or project(x, *others)
    logits = small.logits_at(tokens, positions)
    close(logits, small(tokens)[torch.arange(2)[:, None], positions])
    close(logits, large.logits_at(tokens, positions)[..., :5])
    added = small.embedding.scheme != "none"  # what is added to a token depends on its position
    assert projected == [(2, 29) if added else (5,)] * 2 + [(2, 29)]
    cotangent = normal(2, 2, 5, seed=1)
    gradients = [
        torch.autograd.grad(model.logits_at(tokens, positions)[..., :5], [*model.parameters()], cotangent, materialize_grads=True)
        for model in (small, large)
    ]
    close(gradients[0], tuple(g[: len(s)] if s.dim() else g for s, g in zip(*gradients, strict=True)))


@pytest.mark.parametrize("name", ONE_PER_MIXER)
def test_a_model_keeps_the_initial_weights_of_its_mixer(name, monkeypatch):
    built = []

    def record(config, **sizes):
        mixer = build_mixer(config, **sizes)
        built.append({weight: value.clone() for weight, value in mixer.state_dict().items()})
        return mixer

    monkeypatch.setattr("cat.model.build_mixer", record)
    model = SequenceModel(configure(**EXAMPLES[name], mlp=2), vocabulary=11, length=13)
    for weight, value in model.blocks[0].mixer.state_dict().items():
        assert torch.equal(value, built[0][weight]), weight


# Parameters.

CAT = {"mixer": "attention", "width": 64, "heads": 1, "position": "none", "qk_norm": True, "conv_q": 4, "conv_k": 4}
EQUAL_SIZE = {
    "transformer": {**CAT, "conv_q": None, "conv_k": None},
    "qkv": {**CAT, "conv_v": 4},
    "full": {**CAT, "conv_q": "full", "conv_k": "full"},
    "channel": {**CAT, "sharing": "channel", "filter_bias": True},
    "mixing": {**CAT, "heads": 2, "sharing": "mixing"},
    "network": {**CAT, "conv_q": "network", "conv_k": "network", "filter_size": 16},
    "decay": {**CAT, "conv_q": "decay", "conv_k": "decay", "filter_size": 4},
    "state": {**CAT, "conv_q": "state", "conv_k": "state", "filter_size": 4},
    "state per channel": {**CAT, "conv_q": "state", "conv_k": "state", "filter_size": 4, "sharing": "channel"},
    "lincat": {**CAT, "mixer": "linear", "qk_norm": False},
    "delta": {"mixer": "delta", "width": 64, "heads": 1, "output_gate": False},
    "gla": {"mixer": "gla", "width": 64, "heads": 1},
}
"""One layer of width 64 at a training length of 128."""
LARGER_SIZE = {
    "mamba": {"mixer": "mamba", "width": 64},  # three linear maps of 2 D channels, 6 D^2 weights; attention has 4 D^2
    "full per channel": {**CAT, "conv_q": "full", "conv_k": "full", "sharing": "channel"},  # 2 L D kernel values
    "learned": {**CAT, "position": "learned"},  # L D position weights
}


def count_parameters(parameters: dict[str, object]) -> int:
    """Parameters of a whole model with a vocabulary of 64 keys, 64 values, BOS and a blank."""
    model = SequenceModel(configure(**parameters), vocabulary=130, length=128)
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", EQUAL_SIZE)
def test_a_baseline_has_about_as_many_parameters_as_cat(name):
    assert count_parameters(EQUAL_SIZE[name]) == pytest.approx(count_parameters(CAT), rel=0.1)


@pytest.mark.parametrize("name", LARGER_SIZE)
def test_these_have_more_parameters_and_are_no_equal_baselines(name):
    assert count_parameters(LARGER_SIZE[name]) > 1.2 * count_parameters(CAT)
