"""Mixers are found by their folder, and a model is composed from keys in one mapping."""

import importlib
import re
import subprocess
import sys

import pytest
from pydantic import ValidationError

from cat.config import MixerConfig, ModelConfig
from cat.mixers.attention.config import AttentionConfig
from cat.mixers.build import build_mixer
from cat.mixers.mamba.config import MambaConfig
from cat.mixers.registry import (
    MODEL_KEYS,
    UnknownMixerError,
    compose,
    mixer_class,
    mixer_examples,
    mixer_module,
    mixer_names,
    model_config,
    read_model,
)

ATTENTION = {"mixer": "attention", "heads": 2}
MAMBA = {"mixer": "mamba", "state": 3}
SIZES = {"width": 12, "layers": 4}
MEAN_CONFIG = """
from cat.config import Count, MixerConfig

class MeanConfig(MixerConfig):
    scale: Count = 1
"""
MEAN_LAYER = """
import torch
from cat.mixers.base import Mixer
from cat.ops.position import gather_positions

class Mean(Mixer):
    def __init__(self, config, *, width, length):
        super().__init__()
        self.scale = config.scale

    def project(self, x):
        return self.scale * x

    def mix(self, projected, positions=None):
        count = torch.arange(1, projected.shape[1] + 1, device=projected.device)[:, None]
        return gather_positions(projected.cumsum(1) / count, positions)
"""


def mixers(settings, defaults=None):
    """The values of each mixer, without those of the model."""
    return [section.values for section in compose(settings, defaults).mixers]


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package `somebody_s` with a mixer `mean`, in a folder on the import path."""
    folder = tmp_path / "somebody_s" / "mean"
    folder.mkdir(parents=True)
    for file in (folder.parent / "__init__.py", folder / "__init__.py"):
        file.touch()
    (folder / "config.py").write_text(MEAN_CONFIG)
    (folder / "layer.py").write_text(MEAN_LAYER)
    monkeypatch.syspath_prepend(tmp_path)
    yield folder
    mixer_class.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == "somebody_s"]:
        del sys.modules[name]


# Names.


def test_every_folder_of_mixers_is_a_mixer_with_its_name():
    assert {"attention", "linear", "mamba"} <= set(mixer_names())
    for name in mixer_names():
        config = mixer_class(name)
        assert issubclass(config, MixerConfig)
        assert config.__module__ == f"cat.mixers.{name}.config"
    assert AttentionConfig(heads=1).mixer == "attention"


def test_a_configuration_is_found_without_torch():
    script = "import sys; from cat.mixers.registry import *; print(*map(mixer_class, mixer_names()), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("False\n")


@pytest.mark.parametrize(
    "name", ["mambo", "", "base", "registry", "attention/config", "os", "no_such_package.mean", "cat.mixers.mambo"]
)
def test_an_unknown_mixer_is_refused(name):
    with pytest.raises(UnknownMixerError) as caught:
        mixer_class(name)
    assert caught.value.known == mixer_names()


def test_a_mixer_of_another_package_has_its_import_path_as_name(package):
    config = model_config(mixer="somebody_s.mean", scale=3, **SIZES)
    (mixer,) = config.mixers
    assert mixer.mixer == "somebody_s.mean"
    assert mixer_module(mixer.mixer, "layer") == "somebody_s.mean.layer"
    assert type(build_mixer(mixer, width=12, length=5)).__name__ == "Mean"
    assert read_model(config.model_dump(mode="json")) == config


def test_a_label_is_the_name_of_the_folder_unless_the_configuration_has_another(package):
    assert [mixer_class(name).label for name in ("somebody_s.mean", "hyena", "gla")] == ["Mean", "Hyena", "GLA"]
    assert [mixer_class(name).label_with_convolution for name in ("somebody_s.mean", "attention")] == [None, "CAT"]


@pytest.mark.parametrize("count", [0, 2])
def test_a_folder_has_one_configuration_and_one_layer(package, count):
    copies = "".join(MEAN_LAYER.replace("class Mean", f"class Mean{n}") for n in range(count))
    (package / "layer.py").write_text(f"from cat.mixers.linear.layer import LinearAttention\n{copies}")  # an import is no layer
    with pytest.raises(ValueError, match=rf"somebody_s\.mean\.layer must define exactly one mixer, found {count}"):
        build_mixer(mixer_class("somebody_s.mean")(), width=12, length=5)
    mixer_class.cache_clear()
    del sys.modules["somebody_s.mean.config"]
    copies = "".join(MEAN_CONFIG.replace("class Mean", f"class Mean{n}") for n in range(count))
    (package / "config.py").write_text(f"from cat.mixers.linear.config import LinearConfig\n{copies}")
    with pytest.raises(ValueError, match=rf"somebody_s\.mean\.config must define exactly one MixerConfig, found {count}"):
        mixer_class("somebody_s.mean")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (None, "there is no somebody_s/mean/examples.py"),
        ("", "somebody_s.mean.examples must define EXAMPLES, a dict of names and MeanConfig objects"),
        ("EXAMPLES = {}", "must define EXAMPLES"),
        ("EXAMPLES = {'plain': {'scale': 2}}", "must define EXAMPLES"),
        ("from cat.mixers.mamba.config import MambaConfig; EXAMPLES = {'plain': MambaConfig()}", "must define EXAMPLES"),
    ],
    ids=str,
)
def test_a_folder_has_examples_of_its_configuration(package, text, problem):
    if text is not None:
        (package / "examples.py").write_text(text)
    with pytest.raises(ValueError, match=re.escape(problem)):
        mixer_examples("somebody_s.mean")
    sys.modules.pop("somebody_s.mean.examples", None)
    (package / "examples.py").write_text("from .config import MeanConfig\n\nEXAMPLES = {'scaled': MeanConfig(scale=2)}\n")
    importlib.invalidate_caches()
    assert mixer_examples("somebody_s.mean") == {"scaled": mixer_class("somebody_s.mean")(scale=2)}


# Keys.


def test_a_key_goes_to_the_model_or_to_every_mixer_that_has_it():
    composed = compose({"mixer": ["mamba", "attention", "linear"], **SIZES, "layers": 3, "heads": 2, "conv_k": 3, "state": 5})
    assert composed.model.values == {"width": 12, "layers": 3}
    assert [section.values for section in composed.mixers] == [{"state": 5}, *[{"heads": 2, "conv_k": 3}] * 2]
    assert composed.problems == []


def test_a_key_of_one_mixer_wins_over_the_keys_of_all():
    own = {"mixer": "attention", "conv_k": None}
    first, second = mixers({"mixer": [own, "attention"], "heads": 2, "conv_k": 3}, {"conv_k": 7})
    assert (first, second) == ({"conv_k": None, "heads": 2}, {"heads": 2, "conv_k": 3})


def test_a_default_is_used_where_its_key_exists_and_is_not_set():
    defaults = {"mixer": "attention", "heads": 2, "qk_norm": True, "state": 3, "mlp": 2, "no_such_key": 1}
    composed = compose({"mixer": ["delta", "linear"], **SIZES, "heads": 4}, defaults)
    assert [section.values for section in composed.mixers] == [{"heads": 4}, {"heads": 4, "qk_norm": True}]
    assert composed.model.values == {**SIZES, "mlp": 2}
    assert composed.problems == []
    assert [section.schema for section in compose({}, defaults).mixers] == [AttentionConfig]


@pytest.mark.parametrize(
    ("settings", "used"),
    [
        ({}, set()),
        ({"conv_k": 1}, {"sharing", "filter_init"}),
        ({"conv_k": 3}, {"sharing", "filter_init", "dilation"}),
        ({"conv_k": "full"}, {"sharing", "filter_init"}),
        ({"conv_k": "state"}, {"sharing", "filter_init", "filter_size"}),
    ],
)
def test_a_default_of_a_convolution_is_used_where_there_is_one(settings, used):
    defaults = {"sharing": "channel", "filter_init": "random", "dilation": 2, "filter_size": 4}
    (values,) = mixers({**ATTENTION, **settings}, defaults)
    assert values.keys() & defaults.keys() == used
    model_config(**ATTENTION, **SIZES, **settings, **{key: defaults[key] for key in used})
    (own,) = mixers({**ATTENTION, "sharing": "channel"})
    assert own["sharing"] == "channel", "an own setting without effect is an error"


def test_a_default_activation_is_used_where_there_is_an_mlp():
    for settings, used in (({}, {}), ({"mlp": 2}, {"mlp": 2, "activation": "swiglu"})):
        values = compose({**ATTENTION, **settings}, {"activation": "swiglu"}).model.values
        assert {key: values[key] for key in values.keys() & {"mlp", "activation"}} == used


@pytest.mark.parametrize("position", ["none", "rotary", "sinusoidal"])
@pytest.mark.parametrize("default", ["none", "rotary", "learned"])
def test_a_position_replaces_the_default_one(position, default):
    replaced, alone = (compose({**ATTENTION, "position": position}, defaults) for defaults in ({"position": default}, None))
    assert (replaced.model, replaced.mixers) == (alone.model, alone.mixers)


def test_every_value_has_its_source():
    composed = compose({"mixer": [{"mixer": "attention", "conv_k": 3}], "width": 12}, {"heads": 2, "layers": 1})
    (mixer,) = composed.mixers
    assert mixer.sources == {"conv_k": (False, ("mixer", 0, "conv_k")), "heads": (True, ("heads",))}
    assert composed.model.sources == {"width": (False, ("width",)), "layers": (True, ("layers",))}


@pytest.mark.parametrize(
    ("mixer", "position", "of_model", "of_mixers"),
    [
        (["mamba", "attention"], "rotary", None, [None, "rotary"]),
        (["mamba", "attention"], "learned", "learned", [None, None]),
        (["linear", "attention"], "sinusoidal", "sinusoidal", [None, None]),
        (["linear", "attention"], "none", None, ["none", "none"]),
        (["mamba", "delta"], "none", "none", [None, None]),
        ([{"mixer": "attention", "position": "rotary"}, "attention"], "alibi", None, ["rotary", "alibi"]),
        ([{"mixer": "attention", "position": "rotary"}, "attention"], "learned", "learned", ["rotary", None]),
    ],
    ids=str,
)
def test_the_value_of_position_says_which_part_applies_it(mixer, position, of_model, of_mixers):
    composed = compose({"mixer": mixer, "heads": 2, "position": position})
    assert composed.model.values.get("position") == of_model
    assert [section.values.get("position") for section in composed.mixers] == of_mixers
    assert composed.problems == []
    assert mixers({"mixer": mixer, "heads": 2}, {"position": position}) == [section.values for section in composed.mixers]


@pytest.mark.parametrize(
    ("settings", "path", "problem"),
    [
        ({**MAMBA, "heads": 2}, "heads", "unknown key"),
        ({**ATTENTION, "head": 2}, "head", "unknown key"),
        ({**ATTENTION, "mixers": []}, "mixers", "unknown key"),
        ({**ATTENTION, "position": "rotated"}, "position", "must be 'none', 'rotary', 'alibi', 'learned' or 'sinusoidal'"),
        ({**MAMBA, "position": "rotary"}, "position", "no mixer of this variant has it"),
        ({"mixer": ["mamba", {**ATTENTION, "width": 8}]}, "mixer.1.width", "is a key of the model, not of a mixer"),
        ({"mixer": ["mamba", {**ATTENTION, "mlp": 2}]}, "mixer.1.mlp", "is a key of the model, not of a mixer"),
        ({"mixer": [{**MAMBA, "position": "learned"}]}, "mixer.0.position", "is a key of the model, not of a mixer"),
    ],
    ids=str,
)
def test_a_key_that_no_part_has_is_a_problem_with_its_path(settings, path, problem):
    ((found, message),) = compose({**SIZES, **settings}).problems
    assert (".".join(map(str, found)), message.partition(". Fix")[0]) == (path, problem)
    with pytest.raises(ValueError, match=f"^{path}: {problem}"):
        model_config(**{**SIZES, **settings})


@pytest.mark.parametrize(
    ("mixer", "problem"),
    [
        (None, "is missing"),
        ([], "needs at least one mixer"),
        (3, "must be the name of a mixer, or a list"),
        (["mamba", 3], "must be the name of a mixer, or a list"),
        ([{"state": 3}], "must be the name of a mixer, or a list"),
        (["mamba", "mambo"], "unknown mixer"),
    ],
    ids=str,
)
def test_a_mixer_that_is_none_is_refused(mixer, problem):
    with pytest.raises(ValueError, match=problem):
        compose({"mixer": mixer, **SIZES})


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"mixer": ["mamba", "attention"], "heads": 2, "layers": 3}, "needs a multiple of 2 layers, not layers = 3"),
        ({"mixer": ["mamba", {**ATTENTION, "heads": 5}]}, "mixer 1: heads = 5 does not divide width = 12"),
        ({"mixer": "attention", "heads": 5}, "heads = 5 does not divide width = 12"),
        ({"mixer": ["mamba", "attention"]}, "heads"),
        ({"mixer": ["mamba", {**ATTENTION, "position": "learned"}]}, "position"),
        ({**MAMBA, "width": "12"}, "width"),
    ],
    ids=str,
)
def test_an_invalid_value_is_refused(settings, problem):
    with pytest.raises(ValidationError, match=problem):
        model_config(**{**SIZES, **settings})


def test_each_mixer_must_fit_the_training_length():
    config = model_config(mixer=["mamba", {**ATTENTION, "conv_k": 20}], **SIZES)
    config.check_length(20)
    with pytest.raises(ValueError, match="mixer 1: conv_k = 20 is longer than the training length of 16"):
        config.check_length(16)


# A composed model.


def test_mixers_are_repeated_up_to_the_layers():
    config = model_config(mixer=[MAMBA, ATTENTION], **SIZES)
    assert config.layer_mixers == (MambaConfig(state=3), AttentionConfig(heads=2)) * 2


def test_properties_of_a_model_are_those_of_its_mixers():
    convolved = {**ATTENTION, "conv_k": 3}
    for mixer, has_convolution, has_attention in (
        ([ATTENTION, convolved], True, True),
        ([MAMBA, ATTENTION], False, False),
        ([MAMBA, convolved], True, False),
    ):
        config = model_config(mixer=mixer, **SIZES)
        assert (config.has_convolution, config.has_attention) == (has_convolution, has_attention)


@pytest.mark.parametrize("keys", [{}, {"mlp": 2, "position": "learned", "tied": True}])
@pytest.mark.parametrize("mixer", ["mamba", [MAMBA, {**ATTENTION, "conv_k": "full", "position": "rotary"}]], ids=str)
def test_a_saved_model_restores_itself(mixer, keys):
    config = model_config(mixer=mixer, **SIZES, **keys)
    saved = config.model_dump(mode="json")
    assert isinstance(config, ModelConfig)
    assert saved.keys() == {*MODEL_KEYS, "mixers"}
    assert [entry["mixer"] for entry in saved["mixers"]] == [own.mixer for own in config.mixers]
    assert not any(key in entry for entry in saved["mixers"] for key in ("width", "layers", "mlp"))
    assert read_model(saved) == config


# Published layers.


@pytest.mark.parametrize("name", [name for name in mixer_names() if mixer_class(name).paper is not None])
def test_the_defaults_of_a_published_layer_depart_in_nothing(name):
    heads = {"heads": 1} if "heads" in mixer_class(name).model_fields else {}
    (mixer,) = model_config(mixer=name, width=64, layers=1, **heads).mixers
    assert mixer.departures() == {}


def test_departures_are_the_keys_with_another_value():
    (mixer,) = model_config(mixer="delta", width=8, layers=1, heads=2, conv_q=None, gate=True, sharing="head").mixers
    assert mixer.departures() == {"conv_q": None, "sharing": "head"}


def test_convolutions_of_lincat_are_its_own():
    (mixer,) = model_config(mixer="linear", width=8, layers=1, heads=2, conv_k=3, sharing="channel", qk_norm=True).mixers
    assert mixer.departures() == {"qk_norm": True}


def test_attention_with_convolution_departs_from_no_paper():
    assert AttentionConfig(heads=1, conv_k=4, qk_norm=True).departures() == {}


def test_a_default_of_the_study_applies_to_the_convolutions_of_a_published_layer():
    defaults = {"conv_k": 3, "heads": 2, "sharing": "head", "dilation": 2}
    (first,) = mixers({"mixer": "delta"}, defaults)
    assert first == {"conv_k": 3, "heads": 2, "sharing": "head", "dilation": 2}
    (second,) = mixers({"mixer": "delta", "conv_q": None, "conv_k": None, "conv_v": None}, defaults)
    assert second == {"conv_q": None, "conv_k": None, "conv_v": None, "heads": 2}
    (third,) = mixers({"mixer": "delta", "conv_k": None}, defaults)
    assert third == {"conv_k": None, "heads": 2, "sharing": "head", "dilation": 2}
