"""The sequence mixers: one file each, chosen by the class of its configuration.

A mixer is built as `Class(config, length)`; base.py says what it does. Only the file that is asked for is
imported, so a run depends on the code of its own mixer alone.
"""

from cat.config import Attention, Based, Delta, GatedLinear, Hyena, Landmark, Linear, Mamba, Model, Performer
from cat.mixers.base import Mixer


def build_mixer(config: Model, length: int) -> Mixer:
    """The mixer of one block of a model that is trained on `length` tokens."""
    match config:
        case Attention():
            from cat.mixers.attention.layer import CausalAttention

            return CausalAttention(config, length)
        case Linear():
            from cat.mixers.linear.layer import LinearAttention

            return LinearAttention(config, length)
        case Based():
            from cat.mixers.based.layer import TaylorAttention

            return TaylorAttention(config, length)
        case Performer():
            from cat.mixers.performer.layer import RandomFeatureAttention

            return RandomFeatureAttention(config, length)
        case Delta():
            from cat.mixers.delta.layer import DeltaRule

            return DeltaRule(config, length)
        case GatedLinear():
            from cat.mixers.gla.layer import GatedLinearAttention

            return GatedLinearAttention(config, length)
        case Landmark():
            from cat.mixers.landmark.layer import LandmarkAttention

            return LandmarkAttention(config, length)
        case Hyena():
            from cat.mixers.hyena.layer import GatedConvolution

            return GatedConvolution(config, length)
        case Mamba():
            from cat.mixers.mamba.layer import SelectiveStateSpace

            return SelectiveStateSpace(config, length)
        case _:
            raise TypeError(f"cat/mixers/__init__.py: build_mixer has no case for {type(config).__name__}")
