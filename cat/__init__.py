"""The Convolution-Augmented Transformer as a library: layers, tasks, training, evaluation (arXiv 2407.05591).

    from cat import ConvolutionAugmentedAttention
    layer = ConvolutionAugmentedAttention(width=256, heads=4, q=4, k=4, v=4)
    y = layer(x)  # (batch, length, width), causal

Knows no files, no YAML and no tracking; `pipeline` makes a study of it. A name is imported when it is first asked for, so that
whoever wants the configuration alone does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cat.config import Protocol, Schedule
    from cat.evaluation.generation import generate
    from cat.layer import ConvolutionAugmentedAttention
    from cat.mixers.attention.config import Attention
    from cat.mixers.base import Memory
    from cat.mixers.based.config import Based
    from cat.mixers.build import build_mixer
    from cat.mixers.delta.config import Delta
    from cat.mixers.gla.config import GatedLinear
    from cat.mixers.hyena.config import Hyena
    from cat.mixers.landmark.config import Landmark
    from cat.mixers.linear.config import Linear
    from cat.mixers.mamba.config import Mamba
    from cat.mixers.performer.config import Performer
    from cat.mixers.registry import Hybrid, ModelConfiguration, Theory, VariantConfiguration
    from cat.model import SequenceModel

__all__ = [
    "Attention",
    "Based",
    "ConvolutionAugmentedAttention",
    "Delta",
    "GatedLinear",
    "Hybrid",
    "Hyena",
    "Landmark",
    "Linear",
    "Mamba",
    "Memory",
    "ModelConfiguration",
    "Performer",
    "Protocol",
    "Schedule",
    "SequenceModel",
    "Theory",
    "VariantConfiguration",
    "build_mixer",
    "generate",
]

_HOMES = {
    "ConvolutionAugmentedAttention": "cat.layer",
    "Memory": "cat.mixers.base",
    "SequenceModel": "cat.model",
    "build_mixer": "cat.mixers.build",
    "generate": "cat.evaluation.generation",
}

if not TYPE_CHECKING:  # a type checker reads the imports above, and would take every other name for one of these

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(_HOMES.get(name, "cat.config")), name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
