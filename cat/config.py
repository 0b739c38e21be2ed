"""What can be said about a model and its training: frozen, keyword-only classes, their rules in words.

No torch here, so that a study is validated in an instant. No stage of the study depends on this file: a key left out means
that the feature is off, and what it means otherwise is written into plan/, on which they depend.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Literal, Self, cast, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializationInfo,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WithJsonSchema,
    field_serializer,
    field_validator,
    model_validator,
)

Count = Annotated[int, Field(ge=1, lt=2**31)]
Generator = Literal["network", "decay", "state"]
Taps = Count | Literal["full", Generator]
"""Taps of a filter, `full` for as many as the training sequence is long, or what generates them for a sequence of any length."""
Position = Literal["none", "rotary", "alibi", "learned", "sinusoidal"]


class Configuration(BaseModel):
    """Frozen, keyword-only, and strict: unknown keys and values of a neighbouring type are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Variant(Configuration):
    """What every variant answers for itself."""

    mixer: str

    @property
    def filtered(self) -> bool:
        """Whether a causal filter that an ablation can take away is in front of the mixer."""
        return False

    @property
    def attends(self) -> bool:
        """Whether weighted means of the values are read, none of whose weights is negative."""
        return False

    def check_length(self, length: int) -> None:
        """Raises ValueError, in words, where the model cannot be trained on sequences of `length` tokens."""

    def longest(self, length: int) -> int | None:
        """The longest sequence that a model trained at `length` can read; None where there is no limit."""
        return None


class Model(Variant):
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
    def mixers(self) -> tuple[SingleMixer, ...]:
        """What the mixer of each layer is built from, first to last."""
        return (cast(SingleMixer, self),) * self.layers

    @property
    def added(self) -> Literal["none", "learned", "sinusoidal"]:
        """The vectors of positions that are added to those of tokens."""
        return "none"

    def longest(self, length: int) -> int | None:
        return length if self.added == "learned" else None


class AttentionModel(Model):
    """A model whose mixer has queries, keys and values: heads, a position scheme, and a causal filter on any stream."""

    streams: ClassVar[tuple[str, ...]] = ("q", "k", "v")
    """What a filter can be on."""
    heads: Count
    position: Position
    q: Taps | None = None
    """The causal filter on the queries: its taps, `full` for as many as the training sequence is long, or what generates its taps
    for a sequence of any length: a `network`, a basis of fixed `decay`, a `state` space of learned decays. k and v alike."""
    k: Taps | None = None
    v: Taps | None = None
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
        if not self.filters:
            for key in ("sharing", "dilation", "filter_init", "filter_bias", "filter_norm"):
                if getattr(self, key) != type(self).model_fields[key].default:
                    where = f"{', '.join(self.streams[:-1])} or {self.streams[-1]}"
                    raise ValueError(f"{key} = {json.dumps(getattr(self, key))} without a filter on {where}")
        generated = [stream for stream, taps in self.filters.items() if taps in get_args(Generator)]
        if generated and self.filter_size is None:
            raise ValueError(f"{generated[0]} = {self.filters[generated[0]]} needs filter_size, its hidden units or decays")
        if self.filter_size is not None and not generated:
            raise ValueError(
                f"filter_size = {self.filter_size} is for filters whose taps are generated: {', '.join(get_args(Generator))}"
            )
        if self.dilation > 1 and not any(isinstance(taps, int) and taps > 1 for taps in self.filters.values()):
            raise ValueError(f"dilation = {self.dilation} spaces the taps of a filter that counts two or more, and there is none")
        if self.sharing == "mixing" and self.heads == 1:
            raise ValueError("sharing = mixing needs more than one head to mix")
        if self.temperature and self.qk_norm:
            raise ValueError("temperature = true with qk_norm = true, which learns the temperature already")
        return self

    @property
    def filters(self) -> dict[str, Taps]:
        """Stream -> taps, the streams without a filter left out."""
        return {stream: taps for stream in self.streams if (taps := getattr(self, stream)) is not None}

    @property
    def filtered(self) -> bool:
        return bool(self.filters)

    @property
    def attends(self) -> bool:
        return True

    def check_length(self, length: int) -> None:
        for stream, taps in self.filters.items():
            if not isinstance(taps, int):
                continue
            if taps > length:
                raise ValueError(f"{stream} = {taps} taps is longer than the training length of {length}")
            if (taps - 1) * self.dilation >= length:
                raise ValueError(
                    f"{stream} = {taps} taps {self.dilation} tokens apart reach past the training length of {length}"
                )

    def _refuse_alibi(self, reason: str) -> Self:
        if self.position == "alibi":
            raise ValueError(f"alibi position {reason}")
        return self

    @property
    def added(self) -> Literal["none", "learned", "sinusoidal"]:
        return self.position if self.position in ("learned", "sinusoidal") else "none"


class Attention(AttentionModel):
    """Softmax attention, dense and causal. Without a filter it is the transformer, with filters it is CAT."""

    mixer: Literal["attention"]

    @property
    def keys_decide(self) -> bool:
        """Whether recall hangs on one filter a head, on the keys: one layer, no other filter, no positions, no qk_norm."""
        bare = (self.layers, self.position, self.qk_norm) == (1, "none", False)
        return bare and self.filters.keys() == {"k"} and self.sharing == "head" and not self.filter_bias


class Linear(AttentionModel):
    """Linear attention, elu + 1: with filters it is LinCAT."""

    mixer: Literal["linear"]

    @property
    def attends(self) -> bool:
        return self.position != "rotary"  # features that are turned multiply to weights of either sign

    @model_validator(mode="after")
    def _no_alibi(self) -> Self:
        return self._refuse_alibi("is added to the scores before a softmax, and linear attention has none")


class Based(AttentionModel):
    """Softmax attention to a window of tokens, and to all tokens before it through the second-order Taylor features of exp."""

    mixer: Literal["based"]
    window: Count
    """Tokens that are read exactly: the present one and those right before it."""

    @model_validator(mode="after")
    def _no_alibi(self) -> Self:
        return self._refuse_alibi("is added to the scores before a softmax, and Taylor features have none")

    def check_length(self, length: int) -> None:
        super().check_length(length)
        if self.window >= length:
            raise ValueError(f"window = {self.window} leaves nothing to Taylor features in the training length of {length}")


class Performer(AttentionModel):
    """Linear attention with positive random features of exp, drawn once with the weights."""

    mixer: Literal["performer"]
    features: Count
    """Random features a head."""

    @model_validator(mode="after")
    def _no_alibi(self) -> Self:
        return self._refuse_alibi("is added to the scores before a softmax, and random features have none")


class Delta(AttentionModel):
    """A linear recurrence by the delta rule: each token corrects what the state holds under its key."""

    mixer: Literal["delta"]
    gate: bool = False
    """Let the state decay by a share that each token decides."""

    @property
    def attends(self) -> bool:
        return False  # weights of either sign, and of any sum

    @model_validator(mode="after")
    def _no_scores(self) -> Self:
        if self.position == "rotary":
            raise ValueError("rotary position turns keys that the delta rule compares; use none, learned or sinusoidal")
        if self.qk_norm or self.temperature:
            key = "qk_norm" if self.qk_norm else "temperature"
            raise ValueError(f"{key} = true: the delta rule has unit keys and queries always, and no temperature")
        return self._refuse_alibi("is added to the scores before a softmax, and the delta rule has none")


class GatedLinear(AttentionModel):
    """Linear attention without a feature map, each channel of whose state decays by a share that each token decides."""

    mixer: Literal["gla"]
    gate_rank: Count
    """Rank of the map from a token to what it leaves of each channel."""
    output_gate: bool = False
    """Multiply what a head has read by a gate a channel, of the token that reads it."""

    @property
    def attends(self) -> bool:
        return False  # weights of either sign, and of any sum

    @model_validator(mode="after")
    def _rank_is_low(self) -> Self:
        if self.gate_rank > self.width:
            raise ValueError(f"gate_rank = {self.gate_rank} is more than width = {self.width}, the rank of any map of a token")
        return self

    @model_validator(mode="after")
    def _no_scores(self) -> Self:
        if self.position == "rotary":
            raise ValueError("rotary position turns pairs of channels that decay apart; use none, learned or sinusoidal")
        if self.qk_norm or self.temperature:
            key = "qk_norm" if self.qk_norm else "temperature"
            raise ValueError(f"{key} = true: gated linear attention normalises what it reads, which undoes any temperature")
        return self._refuse_alibi("is added to the scores before a softmax, and gated linear attention has none")


class Landmark(AttentionModel):
    """Softmax attention over the query's own block of tokens and the earlier blocks whose landmarks match it best."""

    streams: ClassVar[tuple[str, ...]] = ("q", "k", "v", "summary")
    mixer: Literal["landmark"]
    block: Count
    """Tokens of a block."""
    top: Count
    """Blocks that a query retrieves."""
    summary: Taps | None = None
    """The filter that sums up the filtered keys of a block, at its last token; without it, that token's key is the landmark."""

    @model_validator(mode="after")
    def _no_alibi(self) -> Self:
        return self._refuse_alibi("makes landmarks compete by distance, not by content; landmark attention has none")

    def check_length(self, length: int) -> None:
        super().check_length(length)
        if self.block > length:
            raise ValueError(f"block = {self.block} is longer than the training length of {length}")


class Hyena(Model):
    """A gated long convolution: queries times the convolution of keys times values, a short convolution in front of each."""

    mixer: Literal["hyena"]
    conv: Count
    """Taps of the short convolutions, one filter a channel."""
    filter_size: Count
    """Hidden units of the network that generates the taps of the long one."""

    def check_length(self, length: int) -> None:
        if self.conv > length:
            raise ValueError(f"conv = {self.conv} taps reach past the training length of {length}")


class Mamba(Model):
    """A selective state space behind a short convolution; no heads, no positions, no attention."""

    mixer: Literal["mamba"]
    expand: Count = 2
    """Channels of the state space as a multiple of `width`."""
    state: Count = 16
    """Numbers of state a channel."""
    conv: Count = 4
    """Taps of its convolution, one filter a channel."""

    def check_length(self, length: int) -> None:
        if self.conv > length:
            raise ValueError(f"conv = {self.conv} taps reach past the training length of {length}")


SingleMixer = Attention | Linear | Based | Performer | Delta | GatedLinear | Landmark | Hyena | Mamba
"""What a block can have for a mixer."""
OF_A_MODEL = tuple(key for key in Model.model_fields if key != "mixer")


class Hybrid(Model):
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
            if of_the_model := [key for key in OF_A_MODEL if key in block]:
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
            block.model_dump(mode=info.mode, exclude=set(OF_A_MODEL), exclude_unset=unset, exclude_defaults=defaults)
            for block in blocks
        ]

    @model_validator(mode="after")
    def _blocks_make_layers(self) -> Self:
        if len(self.blocks) < 2 or self.layers % len(self.blocks):
            raise ValueError(f"layers = {self.layers} must be a multiple of the blocks, two or more, not of {len(self.blocks)}")
        return self

    @property
    def mixers(self) -> tuple[SingleMixer, ...]:
        return self.blocks * (self.layers // len(self.blocks))

    @property
    def added(self) -> Literal["none", "learned", "sinusoidal"]:
        return self.position

    @property
    def filtered(self) -> bool:
        return any(block.filtered for block in self.blocks)

    @property
    def attends(self) -> bool:
        return all(block.attends for block in self.blocks)

    def check_length(self, length: int) -> None:
        for place, block in enumerate(self.blocks):
            try:
                block.check_length(length)
            except ValueError as error:
                raise ValueError(f"block {place}: {error}") from None


class Theory(Variant):
    """One layer of attention with the weights that the theorem about its task prescribes, nothing trained (cat/theory.py)."""

    mixer: Literal["theory"]

    @property
    def attends(self) -> bool:
        return True


ModelConfiguration = Annotated[SingleMixer | Hybrid, Field(discriminator="mixer")]
"""Every kind of model there is."""
VariantConfiguration = Annotated[SingleMixer | Hybrid | Theory, Field(discriminator="mixer")]
"""What a line of a study's variants can be: a model to train, or one that is known."""


class Protocol(Configuration):
    """How every model is trained: AdamW, linear warm-up, cosine decay to zero, clipped gradients."""

    weight_decay: Annotated[float, Field(ge=0)]
    """On the matrices of linear maps; never on filters, norms or embeddings."""
    clip: Annotated[float, Field(gt=0)]
    """Largest norm of the gradient."""
    warmup: Annotated[float, Field(ge=0, lt=1)]
    """Share of the steps in which the learning rate rises."""
    validate_every: Count
    """Steps between two looks at the validation split."""
    stop_at: Annotated[float, Field(gt=0, le=1)]
    """Validation accuracy at which training ends early, on tasks that are scored by accuracy."""
    stop_after: Count
    """Looks in a row that must see `stop_at`."""


class Schedule(Configuration):
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
