"""Build a mixer from its configuration; its name is the name of its folder."""

from importlib import import_module

from cat.config import MixerConfig
from cat.mixers.base import Mixer
from cat.mixers.registry import mixer_module


def build_mixer(config: MixerConfig, *, width: int, length: int) -> Mixer:
    """Build the mixer of one block with `width` channels; `length` is the training length in tokens.

    Imports only this mixer's folder, so a run depends only on the code of its own mixer. Raises ValueError if the folder's
    layer.py does not define exactly one mixer.
    """
    module = import_module(mixer_module(config.mixer, "layer"))
    own_classes = [value for value in vars(module).values() if isinstance(value, type) and value.__module__ == module.__name__]
    layers = [value for value in own_classes if issubclass(value, Mixer)]
    if len(layers) != 1:
        raise ValueError(f"{module.__name__} must define exactly one mixer, found {len(layers)}")
    layer: type[Mixer] = layers[0]
    return layer(config, width=width, length=length)
