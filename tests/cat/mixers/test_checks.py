"""A mixer with a fault fails the check for it, with one line that says what is wrong."""

import math
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from cat.mixers import checks
from cat.mixers.base import Cache, Mixer
from cat.mixers.checks import CHECKS, FOLDER_CHECKS, LENGTH, build
from cat.mixers.linear.layer import LinearAttention
from cat.mixers.registry import mixer_examples
from cat.ops.position import gather_positions


class Means(Mixer):
    """The mean of all tokens so far, then a linear map: a mixer without a fault."""

    def __init__(self, config, *, width, length):
        super().__init__()
        self.output = nn.Linear(width, width)

    def project(self, x):
        return x

    def means(self, x):
        return x.cumsum(1) / torch.arange(1, x.shape[1] + 1, device=x.device, dtype=x.dtype)[:, None]

    def mix(self, projected, positions=None):
        return self.output(gather_positions(self.means(projected), positions))


class Wide(Means):
    def forward(self, x, positions=None):
        return super().forward(x, positions).repeat(1, 1, 2)


class NormOverTheBatch(Means):
    def project(self, x):
        return x - x.mean(0)


class LooksAhead(Means):
    def means(self, x):
        return x.mean(1, keepdim=True).expand_as(x)


class OnlyThisToken(Means):
    def means(self, x):
        return x


class IgnoresPositions(Means):
    def mix(self, projected, positions=None):
        return self.output(self.means(projected)[:, : None if positions is None else positions.shape[1]])


class UnusedWeight(Means):
    def __init__(self, config, *, width, length):
        super().__init__(config, width=width, length=length)
        self.unused = nn.Parameter(torch.ones(3))


class ResetsNothing(UnusedWeight):
    def reset_parameters(self):
        pass


class ResetsToOtherValues(UnusedWeight):
    def reset_parameters(self):
        nn.init.constant_(self.unused, 9.0)


class MixesSequences(Means):
    def means(self, x):
        return super().means(x) + x[:1]


class RoundsToBfloat16(Means):
    def means(self, x):
        return super().means(x.bfloat16()).to(x.dtype) if x.dtype == torch.float32 else super().means(x)


class OverflowsInHalf(Means):
    def means(self, x):
        return super().means(x) / torch.tensor(0.0 if x.dtype == torch.bfloat16 else 1.0)


class NanGradient(Means):
    def means(self, x):
        zero = (x - x).square().sum(-1, keepdim=True)
        return super().means(x) + torch.where(zero > 0, zero.sqrt(), 0 * zero)


class ForgetsItsCache(Means):
    def step(self, projected, cache, *, last=False):
        out = self.mix(projected)
        return out[:, -1:] if last else out, Cache(cache.length + projected.shape[1])


class ForgetsPadding(Means):
    supports_padding = True

    def step(self, projected, cache, *, last=False):
        return super().step(projected, replace(cache, padding=None), last=last)


class Branches(Means):
    def means(self, x):
        return super().means(x) if x.sum() > -math.inf else x


class NeedsData(Means):
    def means(self, x):
        return super().means(x) * x.detach().abs().max().item() ** 0


class WrongGradient(Means):
    def means(self, x):
        return super().means(x.detach() * 2 - x)


class NegativeWeights(LinearAttention):
    def attend(self, q, k, v, **options):
        return -super().attend(q, k, v, **options)


FAULTS = [
    (Wide, "shapes", r"an input of shape \(2, 1, 24\) has an output of shape \(2, 1, 48\)"),
    (NormOverTheBatch, "projection", "the projection of one token is not as expected"),
    (LooksAhead, "causality", "the output at token 0 depends on the later token 1"),
    (OnlyThisToken, "causality", "the output at token 1 does not depend on token 0. Fix: if the mixer selects tokens"),
    (IgnoresPositions, "positions", r"the output at single positions is not as expected: .* at \[0, 1, 0\]"),
    (UnusedWeight, "gradients", "3 of 3 gradients of unused are zero"),
    (MixesSequences, "batch", "the output of one sequence of a batch is not as expected"),
    (RoundsToBfloat16, "float32", "the output in float32 is not as expected"),
    (OverflowsInHalf, "bfloat16", "in bfloat16, output is not finite"),
    (NanGradient, "nan", "returned nan values"),
    (ForgetsItsCache, "cache", r"step with 1 token\(s\) after 1 is not as expected"),
    (LooksAhead, "documents", "the output of documents of a row is not as expected"),
    (ForgetsPadding, "prompts", "step_padded after 5 tokens of padding is not as expected"),
    (NegativeWeights, "attention", "attention weights are negative, but has_attention is True"),
    (WrongGradient, "gradcheck", "Jacobian"),
    (Branches, "vmap", "vmap"),
    (NeedsData, "meta", "meta"),
    (UnusedWeight, "reset", "the mixer owns parameters or buffers and has no reset_parameters"),
    (ResetsNothing, "reset", "reset_parameters leaves unused as it is"),
    (ResetsToOtherValues, "reset", "after reset_parameters, unused is about 9, not 1"),
]


@pytest.mark.parametrize("check", CHECKS)
def test_a_mixer_without_a_fault_passes(check, monkeypatch):
    monkeypatch.setattr(checks, "build_mixer", Means)
    config = mixer_examples("hyena")["plain"]  # not used by the layer
    CHECKS[check](config)


@pytest.mark.parametrize(("layer", "check", "problem"), FAULTS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_fault_fails_its_check(layer, check, problem, monkeypatch):
    monkeypatch.setattr(checks, "build_mixer", layer)
    config = mixer_examples("linear" if check == "attention" else "hyena")["plain"]
    with pytest.raises(Exception, match=problem) as caught:
        CHECKS[check](config)
    if isinstance(caught.value, AssertionError):
        assert "\n" not in str(caught.value)


def test_a_step_that_does_not_know_of_padding_is_not_used_with_it(monkeypatch):
    monkeypatch.setattr(checks, "build_mixer", ForgetsPadding)
    monkeypatch.setattr(ForgetsPadding, "supports_padding", False)
    CHECKS["prompts"](mixer_examples("hyena")["plain"])


def test_every_check_has_a_fault_that_it_finds():
    assert {check for _, check, _ in FAULTS} | {"reference"} == CHECKS.keys()


def test_a_wrong_operation_fails_the_check_against_its_reference(monkeypatch):
    config = mixer_examples("linear")["plain"]
    linear_attend = sys.modules["cat.mixers.linear.layer"].linear_attend

    def wrong(q, k, v, **options):
        return linear_attend(q, k, v, **options) + (0 if q.shape[2] == 1 else k.detach() * 0.01)

    wrong.__name__, wrong.__module__ = "linear_attend", "cat.mixers.linear.op"
    monkeypatch.setattr("cat.mixers.linear.layer.linear_attend", wrong)
    with pytest.raises(AssertionError, match=r"^the output at length 19 is not as the reference implementation"):
        CHECKS["reference"](config)


def test_an_operation_needs_a_reference_implementation_that_the_layer_can_use(monkeypatch):
    config = mixer_examples("linear")["plain"]
    monkeypatch.delattr("cat.mixers.linear.layer.linear_attend")
    with pytest.raises(AssertionError, match=r"^layer\.py does not import linear_attend, whose reference"):
        CHECKS["reference"](config)
    monkeypatch.delattr("cat.mixers.linear.op.naive_linear_attend")
    with pytest.raises(AssertionError, match=r"^op\.py has no reference implementation"):
        CHECKS["reference"](config)


def test_examples_cover_every_key(monkeypatch):
    examples = {name: example.model_copy(update={"gate": False}) for name, example in mixer_examples("delta").items()}
    monkeypatch.setattr(checks, "mixer_examples", lambda name: examples)
    with pytest.raises(AssertionError, match=r"^gate = False in every example\. Fix: add one with another value"):
        FOLDER_CHECKS["examples"]("delta")


def test_a_baseline_has_the_size_of_attention(monkeypatch):
    monkeypatch.setattr("cat.mixers.mamba.examples.BASELINE", mixer_examples("mamba")["plain"])
    with pytest.raises(AssertionError, match=r"^BASELINE has 32,640 parameters with 64 channels, and attention 16,384"):
        FOLDER_CHECKS["baseline"]("mamba")


def test_mixers_are_built_with_the_same_weights_and_only_for_settings_that_fit():
    before = torch.get_rng_state()
    first, again = (build(mixer_examples("attention")["all"]) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first.parameters(), again.parameters(), strict=True))
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(ValueError, match="heads = 5 does not divide width = 24"):
        build(mixer_examples("attention")["plain"].model_copy(update={"heads": 5}))
    with pytest.raises(ValueError, match=f"conv_size = {LENGTH + 1} is longer"):
        build(mixer_examples("hyena")["plain"].model_copy(update={"conv_size": LENGTH + 1}))
