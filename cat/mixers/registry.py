"""Union of the mixer configurations: every kind of model."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    SerializationInfo,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WithJsonSchema,
    field_serializer,
    field_validator,
    model_validator,
)

from cat.config import ModelConfig, VariantConfig
from cat.mixers.attention.config import AttentionConfig
from cat.mixers.based.config import BasedConfig
from cat.mixers.delta.config import DeltaConfig
from cat.mixers.gla.config import GLAConfig
from cat.mixers.hyena.config import HyenaConfig
from cat.mixers.landmark.config import LandmarkConfig
from cat.mixers.linear.config import LinearConfig
from cat.mixers.mamba.config import MambaConfig
from cat.mixers.performer.config import PerformerConfig

SingleMixer = (
    AttentionConfig
    | LinearConfig
    | BasedConfig
    | PerformerConfig
    | DeltaConfig
    | GLAConfig
    | LandmarkConfig
    | HyenaConfig
    | MambaConfig
)
"""Configuration of a model whose layers all have the same mixer."""
MODEL_KEYS = tuple(key for key in ModelConfig.model_fields if key != "mixer")
"""Keys that belong to a whole model and not to one block of a hybrid."""


class HybridConfig(ModelConfig):
    """A model whose blocks have different mixers.

    A block has the keys of its mixer, but none of the model, such as `width`.
    """

    mixer: Literal["hybrid"]
    position: Literal["none", "learned", "sinusoidal"] = "none"
    """Position vectors added to the token embedding; rotary and alibi are set per block."""
    blocks: Annotated[
        tuple[Annotated[SingleMixer, Field(discriminator="mixer")], ...],
        Field(strict=False),
        WithJsonSchema({"type": "array", "items": {"type": "object", "required": ["mixer"]}, "minItems": 2}),
    ]
    """Mixers of the first layers, repeated until there are `layers`."""

    @field_validator("blocks", mode="wrap")
    @classmethod
    def _set_model_width(cls, blocks: Any, handler: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Any:
        if not isinstance(blocks, list | tuple):
            return handler(blocks)
        for index, block in enumerate(blocks):
            if not isinstance(block, dict):
                continue
            misplaced = [key for key in MODEL_KEYS if key in block]
            if block.get("position") in ("learned", "sinusoidal"):
                misplaced.append("position")
            if misplaced:
                key = misplaced[0]
                problem = f"block {index}: {key} = {block[key]} is a key of the model, not of a block"
                raise ValueError(f"{problem}. Fix: move {key} out of blocks")
        if "width" not in info.data:  # the error about width is enough
            return ()
        model_keys = {"width": info.data["width"], "layers": 1}
        return handler([{**block, **model_keys} if isinstance(block, dict) else block for block in blocks])

    @field_serializer("blocks")
    def _without_model_keys(self, blocks: tuple[SingleMixer, ...], info: SerializationInfo) -> list[dict[str, Any]]:
        unset, defaults = info.exclude_unset, info.exclude_defaults
        return [
            block.model_dump(mode=info.mode, exclude=set(MODEL_KEYS), exclude_unset=unset, exclude_defaults=defaults)
            for block in blocks
        ]

    @model_validator(mode="after")
    def _blocks_fill_layers(self) -> Self:
        if len(self.blocks) < 2:
            raise ValueError(f"blocks has {len(self.blocks)} mixer(s), a hybrid needs at least 2. Fix: add a block")
        if self.layers % len(self.blocks):
            raise ValueError(f"layers = {self.layers} must be a multiple of the number of blocks, {len(self.blocks)}")
        return self

    @property
    def mixers(self) -> tuple[ModelConfig, ...]:
        return self.blocks * (self.layers // len(self.blocks))

    @property
    def additive_position(self) -> Literal["none", "learned", "sinusoidal"]:
        return self.position

    @property
    def has_convolution(self) -> bool:
        return any(block.has_convolution for block in self.blocks)

    @property
    def has_attention(self) -> bool:
        return all(block.has_attention for block in self.blocks)

    def check_length(self, length: int) -> None:
        for index, block in enumerate(self.blocks):
            try:
                block.check_length(length)
            except ValueError as error:
                raise ValueError(f"block {index}: {error}") from None


class ConstructionConfig(VariantConfig):
    """One untrained attention layer with the weights of a construction of the paper.

    cat/theory.py computes the weights for a task.
    """

    mixer: Literal["construction"]

    @property
    def has_attention(self) -> bool:
        return True


AnyModel = Annotated[SingleMixer | HybridConfig, Field(discriminator="mixer")]
"""Configuration of any model."""
AnyVariant = Annotated[SingleMixer | HybridConfig | ConstructionConfig, Field(discriminator="mixer")]
"""Configuration of a variant in a study: a model to train, or a construction."""
