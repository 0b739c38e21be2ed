"""The family of a variant, which figures show by its colour and tables by its words."""

from __future__ import annotations

from cat.config import ModelConfig, QKVConfig
from cat.mixers.registry import AnyVariant

ATTENTION, CAT, RECURRENT, HYBRID, CONSTRUCTION = "attention", "cat", "recurrent", "hybrid", "construction"
FAMILIES = {
    ATTENTION: "attention",
    CAT: "attention with convolution (CAT)",
    RECURRENT: "recurrence, linear attention or long convolution",
    HYBRID: "attention and another mixer",
    CONSTRUCTION: "construction, not trained",
}
"""Family -> its words."""
SOFTMAX = ("attention", "landmark", "multi_token")
"""The mixers with softmax attention, whose state grows with the sequence."""


def family(model: AnyVariant) -> str:
    """The family of a model: its name among FAMILIES."""
    if not isinstance(model, ModelConfig):
        return CONSTRUCTION
    attends = {mixer.mixer in SOFTMAX for mixer in model.mixers}
    if len(attends) > 1:
        return HYBRID
    if not attends.pop():
        return RECURRENT
    shifts = any(isinstance(mixer, QKVConfig) and mixer.token_shift for mixer in model.mixers)
    convolves_logits = any(mixer.mixer == "multi_token" for mixer in model.mixers)
    return CAT if model.has_convolution or shifts or convolves_logits else ATTENTION
