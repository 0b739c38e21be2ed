"""Configuration of softmax attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Self

from pydantic import Field, model_validator

from cat.config import Count, DotProductConfig, ModelConfig, VariantConfig


class AttentionConfig(DotProductConfig):
    """Dense causal softmax attention: the transformer, or CAT with convolutions."""

    label: ClassVar = "Transformer"
    label_with_convolution: ClassVar = "CAT"
    kv_heads: Count | None = None
    """Heads of keys and values, each shared by as many consecutive heads of queries; None: as many as `heads`."""
    rope_base: Annotated[float, Field(gt=0)] = 10_000.0
    """Base of the frequencies of rotary positions."""
    rope_scale: Annotated[float, Field(gt=0)] = 1.0
    """Divide rotary positions by this number: linear position interpolation (arXiv 2306.15595)."""
    window: Count | None = None
    """Tokens that a query sees, its own included; None: all."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability that an attention weight is dropped in training."""
    bias: bool = False
    """Add a learned bias to the projections to q, k, v and the output."""

    @classmethod
    def unused_keys(cls, values: Mapping[str, Any]) -> set[str]:
        rotary = values.get("position") == "rotary"
        return super().unused_keys(values) | (set() if rotary else {"rope_base", "rope_scale"})

    @model_validator(mode="after")
    def _options_fit(self) -> Self:
        if self.heads % self.heads_of("k"):
            raise ValueError(f"kv_heads = {self.kv_heads} does not divide heads = {self.heads}")
        if self.sharing == "mixing" and self.heads_of("k") == 1 and (self.conv_k is not None or self.conv_v is not None):
            raise ValueError("sharing = mixing needs more than one head of keys and values, not kv_heads = 1")
        if self.token_shift and self.bias:
            raise ValueError("token_shift = true projects two parts of each token, which would add the bias of bias = true twice")
        for key in ("rope_base", "rope_scale"):
            if self.position != "rotary" and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} = {getattr(self, key):g} needs position = rotary")
        return self

    def heads_of(self, projection: str) -> int:
        return self.heads if projection == "q" or self.kv_heads is None else self.kv_heads

    @property
    def linear_bias(self) -> bool:
        return self.bias

    @property
    def differs_in_training(self) -> bool:
        return self.dropout > 0

    @property
    def selects_tokens(self) -> bool:
        return self.window is not None


def only_keys_convolved(model: VariantConfig) -> bool:
    """Whether one kernel per head on the keys decides recall.

    True for one layer of attention to all tokens without other convolutions, positions, qk_norm or bias.
    """
    if not (isinstance(model, ModelConfig) and model.layers == 1 and model.position == "none" and model.canon is None):
        return False
    (mixer,) = model.mixers
    if not isinstance(mixer, AttentionConfig) or mixer.position != "none" or mixer.qk_norm:
        return False
    if mixer.window is not None or mixer.bias or mixer.token_shift or mixer.conv_activation != "none":
        return False
    return mixer.kernel_sizes.keys() == {"k"} and mixer.sharing == "head" and not mixer.filter_bias
