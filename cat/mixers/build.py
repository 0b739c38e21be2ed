"""Build a mixer from its configuration; its name is the name of its folder."""

from importlib import import_module
from importlib.util import find_spec

from cat.config import MixerConfig
from cat.mixers.base import Mixer
from cat.mixers.registry import mixer_module


def build_mixer(config: MixerConfig, *, width: int, length: int) -> Mixer:
    """Build the mixer of one block with `width` channels; `length` is the training length in tokens.

    Raises ValueError as `mixer_layer` does.
    """
    return mixer_layer(config.mixer)(config, width=width, length=length)


def mixer_layer(name: str) -> type[Mixer]:
    """Return the layer of a mixer.

    Imports only this mixer's folder, so a run depends only on the code of its own mixer. Raises ValueError if the folder has no
    layer.py, or one that does not define exactly one mixer.
    """
    path = mixer_module(name, "layer")
    if find_spec(path) is None:
        raise ValueError(f"there is no {path.replace('.', '/')}.py")
    module = import_module(path)
    own_classes = [value for value in vars(module).values() if isinstance(value, type) and value.__module__ == path]
    layers = [value for value in own_classes if issubclass(value, Mixer)]
    if len(layers) != 1:
        raise ValueError(f"{path} must define exactly one mixer, found {len(layers)}")
    layer: type[Mixer] = layers[0]
    return layer
