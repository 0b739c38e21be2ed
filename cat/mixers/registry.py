"""Every kind of model: the union of the mixers' configurations."""

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
"""What a block can have for a mixer."""
MODEL_KEYS = tuple(key for key in ModelConfig.model_fields if key != "mixer")


class HybridConfig(ModelConfig):
    """Blocks with different mixers, each with what its mixer can be told and nothing of the model: `width` and the like."""

    mixer: Literal["hybrid"]
    position: Literal["none", "learned", "sinusoidal"] = "none"
    """Vectors of positions that are added to those of tokens; rotary and alibi are said of a block."""
    blocks: Annotated[
        tuple[Annotated[SingleMixer, Field(discriminator="mixer")], ...],
        Field(strict=False),
        WithJsonSchema({"type": "array", "items": {"type": "object", "required": ["mixer"]}, "minItems": 2}),
    ]
    """The mixers of the first layers; those of the next ones are the same again, until there are `layers`."""

    @field_validator("blocks", mode="wrap")
    @classmethod
    def _in_the_width_of_the_model(cls, blocks: Any, handler: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Any:
        if not isinstance(blocks, list | tuple):
            return handler(blocks)
        for place, block in enumerate(blocks):
            if not isinstance(block, dict):
                continue
            if of_the_model := [key for key in MODEL_KEYS if key in block]:
                raise ValueError(f"block {place}: {of_the_model[0]} is said of the whole model, not of a block")
            if block.get("position") in ("learned", "sinusoidal"):
                raise ValueError(f"block {place}: {block['position']} positions are added to tokens: position of the whole model")
        if "width" not in info.data:  # which is at fault itself
            return ()
        own = {"width": info.data["width"], "layers": 1}
        return handler([{**block, **own} if isinstance(block, dict) else block for block in blocks])

    @field_serializer("blocks")
    def _without_what_is_the_models(self, blocks: tuple[SingleMixer, ...], info: SerializationInfo) -> list[dict[str, Any]]:
        unset, defaults = info.exclude_unset, info.exclude_defaults
        return [
            block.model_dump(mode=info.mode, exclude=set(MODEL_KEYS), exclude_unset=unset, exclude_defaults=defaults)
            for block in blocks
        ]

    @model_validator(mode="after")
    def _blocks_make_layers(self) -> Self:
        if len(self.blocks) < 2 or self.layers % len(self.blocks):
            raise ValueError(f"layers = {self.layers} must be a multiple of the blocks, two or more, not of {len(self.blocks)}")
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
        for place, block in enumerate(self.blocks):
            try:
                block.check_length(length)
            except ValueError as error:
                raise ValueError(f"block {place}: {error}") from None


class ConstructionConfig(VariantConfig):
    """One layer of attention with the weights that the theorem about its task prescribes, nothing trained (cat/theory.py)."""

    mixer: Literal["construction"]

    @property
    def has_attention(self) -> bool:
        return True


AnyModel = Annotated[SingleMixer | HybridConfig, Field(discriminator="mixer")]
"""Every kind of model there is."""
AnyVariant = Annotated[SingleMixer | HybridConfig | ConstructionConfig, Field(discriminator="mixer")]
"""What a line of a study's variants can be: a model to train, or one that is known."""
