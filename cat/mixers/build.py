"""The layer of a mixer, chosen by the name of its folder."""

from importlib import import_module

from cat.config import ModelConfig
from cat.mixers.base import Mixer


def build_mixer(config: ModelConfig, length: int) -> Mixer:
    """Build the mixer of one block of a model that is trained on `length` tokens.

    Only the folder of this mixer is imported, so a run depends on the code of its own mixer only. Raises ValueError unless the
    folder's layer.py defines exactly one mixer.
    """
    module = import_module(f"cat.mixers.{config.mixer}.layer")
    own = [kind for kind in vars(module).values() if isinstance(kind, type) and kind.__module__ == module.__name__]
    layers = [kind for kind in own if issubclass(kind, Mixer)]
    if len(layers) != 1:
        raise ValueError(f"{module.__name__} must define exactly one mixer, not {len(layers)}")
    layer: type[Mixer] = layers[0]
    return layer(config, length)
