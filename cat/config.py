"""What can be said about a model and its training: frozen, keyword-only classes, their rules in words.

No torch here, so that a study is validated in an instant. No stage of the study depends on this file: a key left out means
that the feature is off, and what it means otherwise is written into plan/, on which they depend.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

Count = Annotated[int, Field(ge=1, lt=2**31)]
KernelGenerator = Literal["network", "decay", "state"]
KernelSize = Count | Literal["full", KernelGenerator]
"""Taps of a filter, `full` for as many as the training sequence is long, or what generates them for a sequence of any length."""
Position = Literal["none", "rotary", "alibi", "learned", "sinusoidal"]


class Config(BaseModel):
    """Frozen, keyword-only, and strict: unknown keys and values of a neighbouring type are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
    renamed_keys: ClassVar[Mapping[str, str]] = {}
    """Old key -> new key, for the error message."""


class VariantConfig(Config):
    """What every variant answers for itself."""

    mixer: str

    @property
    def has_convolution(self) -> bool:
        """Whether a causal filter that an ablation can take away is in front of the mixer."""
        return False

    @property
    def has_attention(self) -> bool:
        """Whether weighted means of the values are read, none of whose weights is negative."""
        return False

    def check_length(self, length: int) -> None:
        """Raises ValueError, in words, where the model cannot be trained on sequences of `length` tokens."""

    def max_length(self, length: int) -> int | None:
        """The longest sequence that a model trained at `length` can read; None where there is no limit."""
        return None


class ModelConfig(VariantConfig):
    """What every trained model has: `layers` pre-norm residual blocks of a mixer, each followed by an MLP if there is one."""

    width: Count
    """Channels d of the residual stream."""
    layers: Count
    mlp: Count | None = None
    """Hidden width of the MLP as a multiple of `width`; without it, a block is its mixer alone."""
    activation: Literal["gelu", "swiglu"] = "gelu"
    """Of the MLP: GELU as in Pythia, or a gate times a linear map as in LLaMA (2002.05202)."""
    norm: Literal["layer", "rms"] = "layer"
    """Before every mixer, MLP and the head: LayerNorm, or RMSNorm (1910.07467)."""
    tied: bool = False
    """Read the answers off with the embedding's own vectors."""

    @model_validator(mode="after")
    def _an_activation_is_of_something(self) -> Self:
        if self.mlp is None and self.activation != "gelu":
            raise ValueError(f"activation = {self.activation} needs mlp, the width of what it is in")
        return self

    @property
    def mixers(self) -> tuple[ModelConfig, ...]:
        """What the mixer of each layer is built from, first to last."""
        return (self,) * self.layers

    @property
    def additive_position(self) -> Literal["none", "learned", "sinusoidal"]:
        """The vectors of positions that are added to those of tokens."""
        return "none"

    def max_length(self, length: int) -> int | None:
        return length if self.additive_position == "learned" else None


class QKVConfig(ModelConfig):
    """A model whose mixer has queries, keys and values: heads, a position scheme, and a causal filter on any stream."""

    projections: ClassVar[tuple[str, ...]] = ("q", "k", "v")
    """What a filter can be on."""
    renamed_keys: ClassVar = {"q": "conv_q", "k": "conv_k", "v": "conv_v"}
    heads: Count
    position: Position
    conv_q: KernelSize | None = None
    """The causal filter on the queries: its taps, `full` for as many as the training sequence is long, or what generates its taps
    for a sequence of any length: a `network`, a basis of fixed `decay`, a `state` space of learned decays. k and v alike."""
    conv_k: KernelSize | None = None
    conv_v: KernelSize | None = None
    sharing: Literal["head", "channel", "mixing"] = "head"
    """Who shares the taps of a filter: one filter a head, one a channel, or one from every head to every head."""
    dilation: Count = 1
    """How many tokens a tap is from the next; 1: none is skipped."""
    filter_size: Count | None = None
    """Hidden units of a `network`, decays of a `decay` or `state` filter."""
    filter_init: Literal["identity", "random"] = "identity"
    """Filters begin as the identity with a little noise, or at random."""
    filter_bias: bool = False
    """Add a learned vector to what is filtered."""
    filter_norm: bool = False
    """Divide every filter by the sum of its absolute taps, a generated one by that of as many as a training sequence has."""
    qk_norm: bool = False
    """Scale queries and keys to unit length after the filter; the temperature is then learned, one a head."""
    temperature: bool = False
    """Learn the temperature, one a head, without scaling queries and keys."""

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"heads = {self.heads} does not divide width = {self.width}")
        if self.position == "rotary" and (self.width // self.heads) % 2:
            raise ValueError(f"rotary position needs an even head width, not {self.width // self.heads}")
        return self

    @model_validator(mode="after")
    def _filters_are_there(self) -> Self:
        if not self.kernel_sizes:
            for key in ("sharing", "dilation", "filter_init", "filter_bias", "filter_norm"):
                if getattr(self, key) != type(self).model_fields[key].default:
                    where = f"{', '.join(self.projections[:-1])} or {self.projections[-1]}"
                    raise ValueError(f"{key} = {json.dumps(getattr(self, key))} without a filter on {where}")
        generated = [projection for projection, size in self.kernel_sizes.items() if size in get_args(KernelGenerator)]
        if generated and self.filter_size is None:
            raise ValueError(f"{generated[0]} = {self.kernel_sizes[generated[0]]} needs filter_size, its hidden units or decays")
        if generated == [] and self.filter_size is not None:
            raise ValueError(
                f"filter_size = {self.filter_size} is for filters whose taps are generated: {', '.join(get_args(KernelGenerator))}"
            )
        if self.dilation > 1 and not any(isinstance(size, int) and size > 1 for size in self.kernel_sizes.values()):
            raise ValueError(f"dilation = {self.dilation} spaces the taps of a filter that counts two or more, and there is none")
        if self.sharing == "mixing" and self.heads == 1:
            raise ValueError("sharing = mixing needs more than one head to mix")
        if self.temperature and self.qk_norm:
            raise ValueError("temperature = true with qk_norm = true, which learns the temperature already")
        return self

    @property
    def kernel_sizes(self) -> dict[str, KernelSize]:
        """Kernel size by projection, for the projections that have a convolution."""
        sizes = {projection: getattr(self, f"conv_{projection}") for projection in self.projections}
        return {projection: size for projection, size in sizes.items() if size is not None}

    @property
    def has_convolution(self) -> bool:
        return bool(self.kernel_sizes)

    @property
    def has_attention(self) -> bool:
        return True

    def check_length(self, length: int) -> None:
        for projection, size in self.kernel_sizes.items():
            if not isinstance(size, int):
                continue
            if size > length:
                raise ValueError(f"{projection} = {size} taps is longer than the training length of {length}")
            if (size - 1) * self.dilation >= length:
                raise ValueError(
                    f"{projection} = {size} taps {self.dilation} tokens apart reach past the training length of {length}"
                )

    def _refuse_alibi(self, reason: str) -> Self:
        if self.position == "alibi":
            raise ValueError(f"alibi position {reason}")
        return self

    @property
    def additive_position(self) -> Literal["none", "learned", "sinusoidal"]:
        return self.position if self.position in ("learned", "sinusoidal") else "none"


class OptimizerConfig(Config):
    """How every model is trained: AdamW, linear warm-up, cosine decay to zero, clipped gradients."""

    renamed_keys: ClassVar = {
        "clip": "grad_clip", "validate_every": "eval_every", "stop_at": "early_stop_accuracy", "stop_after": "early_stop_patience",
    }  # fmt: skip
    weight_decay: Annotated[float, Field(ge=0)]
    """On the matrices of linear maps; never on filters, norms or embeddings."""
    grad_clip: Annotated[float, Field(gt=0)]
    """Largest norm of the gradient."""
    warmup: Annotated[float, Field(ge=0, lt=1)]
    """Share of the steps in which the learning rate rises."""
    eval_every: Count
    """Steps between two looks at the validation split."""
    early_stop_accuracy: Annotated[float, Field(gt=0, le=1)]
    """Validation accuracy at which training ends early, on tasks that are scored by accuracy."""
    early_stop_patience: Count
    """Looks in a row that must see `stop_at`."""


class TrainingConfig(Config):
    """How long one task is trained."""

    steps: Count
    batch: Count
    """Sequences a step."""
    micro_batch: Count | None = None
    """Sequences at a time, where there is no memory for a whole batch: their gradients are added up before the step."""
    compile: bool = False
    """Let torch.compile fuse the operations of a step: worth it for long training of large models; other last bits."""
    learning_rates: Annotated[tuple[Annotated[float, Field(gt=0, le=1)], ...], Field(min_length=1, strict=False)]
    """Peaks to try; the validation split chooses one for all seeds of a variant."""

    @model_validator(mode="after")
    def _rates_differ(self) -> Self:
        if len(set(self.learning_rates)) < len(self.learning_rates):
            raise ValueError(f"learning_rates = {list(self.learning_rates)} has a value twice")
        return self

    @model_validator(mode="after")
    def _a_micro_batch_is_part_of_a_batch(self) -> Self:
        if self.micro_batch is not None and self.micro_batch >= self.batch:
            raise ValueError(f"micro_batch = {self.micro_batch} is no part of batch = {self.batch}; it must be smaller")
        return self
