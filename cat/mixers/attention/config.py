"""Configuration of softmax attention."""

from __future__ import annotations

from typing import ClassVar

from cat.config import DotProductConfig, ModelConfig, VariantConfig


class AttentionConfig(DotProductConfig):
    """Dense causal softmax attention: the transformer, or CAT with convolutions."""

    label: ClassVar = "Transformer"
    label_with_convolution: ClassVar = "CAT"


def only_keys_convolved(model: VariantConfig) -> bool:
    """Whether one kernel per head on the keys decides recall.

    True for one layer of attention without other convolutions, positions or qk_norm.
    """
    if not (isinstance(model, ModelConfig) and model.layers == 1 and model.position == "none"):
        return False
    (mixer,) = model.mixers
    if not isinstance(mixer, AttentionConfig) or mixer.position != "none" or mixer.qk_norm:
        return False
    return mixer.kernel_sizes.keys() == {"k"} and mixer.sharing == "head" and not mixer.filter_bias
