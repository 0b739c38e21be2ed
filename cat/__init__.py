"""The Convolution-Augmented Transformer as a library (arXiv 2407.05591).

    from cat import ConvolutionAugmentedAttention
    layer = ConvolutionAugmentedAttention(width=256, heads=4, conv_q=4, conv_k=4, conv_v=4)
    y = layer(x)  # (batch, length, width), causal

The library uses no files, no YAML and no tracking; `pipeline` runs the study with it. Names are imported on first use, so
importing only a configuration does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cat.config import ModelConfig, TrainingConfig
    from cat.conversion import convert, load_converted
    from cat.evaluation.generation import generate
    from cat.layer import ConvolutionAugmentedAttention
    from cat.mixers.attention.config import AttentionConfig
    from cat.mixers.base import Cache
    from cat.mixers.based.config import BasedConfig
    from cat.mixers.build import build_mixer
    from cat.mixers.canon import Canon
    from cat.mixers.delta.config import DeltaConfig
    from cat.mixers.gated_conv.config import GatedConvConfig
    from cat.mixers.gla.config import GLAConfig
    from cat.mixers.hyena.config import HyenaConfig
    from cat.mixers.landmark.config import LandmarkConfig
    from cat.mixers.linear.config import LinearConfig
    from cat.mixers.mamba.config import MambaConfig
    from cat.mixers.multi_token.config import MultiTokenConfig
    from cat.mixers.performer.config import PerformerConfig
    from cat.mixers.registry import AnyVariant, ConstructionConfig, model_config
    from cat.model import SequenceModel

__all__ = [
    "AnyVariant",
    "AttentionConfig",
    "BasedConfig",
    "Cache",
    "Canon",
    "ConstructionConfig",
    "ConvolutionAugmentedAttention",
    "DeltaConfig",
    "GLAConfig",
    "GatedConvConfig",
    "HyenaConfig",
    "LandmarkConfig",
    "LinearConfig",
    "MambaConfig",
    "ModelConfig",
    "MultiTokenConfig",
    "PerformerConfig",
    "SequenceModel",
    "TrainingConfig",
    "build_mixer",
    "convert",
    "generate",
    "load_converted",
    "model_config",
]

_MODULES = {
    "AnyVariant": "cat.mixers.registry",
    "AttentionConfig": "cat.mixers.attention.config",
    "BasedConfig": "cat.mixers.based.config",
    "Cache": "cat.mixers.base",
    "Canon": "cat.mixers.canon",
    "ConstructionConfig": "cat.mixers.registry",
    "ConvolutionAugmentedAttention": "cat.layer",
    "DeltaConfig": "cat.mixers.delta.config",
    "GLAConfig": "cat.mixers.gla.config",
    "GatedConvConfig": "cat.mixers.gated_conv.config",
    "HyenaConfig": "cat.mixers.hyena.config",
    "LandmarkConfig": "cat.mixers.landmark.config",
    "LinearConfig": "cat.mixers.linear.config",
    "MambaConfig": "cat.mixers.mamba.config",
    "ModelConfig": "cat.config",
    "MultiTokenConfig": "cat.mixers.multi_token.config",
    "PerformerConfig": "cat.mixers.performer.config",
    "SequenceModel": "cat.model",
    "TrainingConfig": "cat.config",
    "build_mixer": "cat.mixers.build",
    "convert": "cat.conversion",
    "generate": "cat.evaluation.generation",
    "load_converted": "cat.conversion",
    "model_config": "cat.mixers.registry",
}

if not TYPE_CHECKING:  # with __getattr__ visible, a type checker would accept any name

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(_MODULES[name]), name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
