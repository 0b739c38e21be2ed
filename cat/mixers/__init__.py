"""The sequence mixers: one file each, chosen by the class of its configuration.

A mixer is built as `Mixer(config, length)` and maps (B, L, D) to (B, L, D) causally. Only the file that is asked for is
imported, so a run depends on the code of its own mixer alone.
"""

from torch import nn

from cat.configuration import Attention, Landmark, Linear, Mamba, ModelConfiguration


def build_mixer(config: ModelConfiguration, length: int) -> nn.Module:
    """The mixer of one block of a model that is trained on `length` tokens."""
    match config:
        case Attention():
            from cat.mixers.attention import CausalAttention

            return CausalAttention(config, length)
        case Linear():
            from cat.mixers.linear import LinearAttention

            return LinearAttention(config, length)
        case Landmark():
            from cat.mixers.landmark import LandmarkAttention

            return LandmarkAttention(config, length)
        case Mamba():
            from cat.mixers.mamba import Mamba as MambaMixer

            return MambaMixer(config, length)
