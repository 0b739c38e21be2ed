"""What can be said about a model and its training: frozen, keyword-only classes, their rules in words.

No torch here, so that a study is validated in an instant. A key left out means that the feature is off; nothing here is a
number that an experiment depends on, which is why no stage of the study depends on this file.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Count = Annotated[int, Field(ge=1)]
FilterWidth = Count | Literal["full"]
Position = Literal["none", "rotary", "alibi", "learned", "sinusoidal"]


class Configuration(BaseModel):
    """Frozen, keyword-only, and strict: unknown keys and values of a neighbouring type are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Model(Configuration):
    """What every model has: `layers` pre-norm residual blocks of one mixer, each followed by an MLP if there is one."""

    mixer: str
    width: Count
    """Channels d of the residual stream."""
    layers: Count
    mlp: Count | None = None
    """Hidden width of the MLP as a multiple of `width`; without it, a block is its mixer alone."""
    tied: bool = False
    """Read the answers off with the embedding's own vectors."""

    @property
    def filtered(self) -> bool:
        """Whether a causal filter that an ablation can take away is in front of the mixer."""
        return False

    def check_length(self, length: int) -> None:
        """Raises ValueError, in words, where the model cannot be trained on sequences of `length` tokens."""

    def longest(self, length: int) -> int | None:
        """The longest sequence that a model trained at `length` can read; None where there is no limit."""
        return None


class AttentionModel(Model):
    """A model whose mixer has queries, keys and values: heads, a position scheme, and a causal filter on any stream."""

    heads: Count
    position: Position
    q: FilterWidth | None = None
    """Taps of the causal filter on the queries, `full` for as many as the training sequence is long; k and v alike."""
    k: FilterWidth | None = None
    v: FilterWidth | None = None
    filter_norm: bool = False
    """Divide every filter by the sum of its absolute taps."""
    qk_norm: bool = False
    """Scale queries and keys to unit length after the filter; the temperature is then learned, one a head."""

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"heads = {self.heads} does not divide width = {self.width}")
        if self.position == "rotary" and (self.width // self.heads) % 2:
            raise ValueError(f"rotary position needs an even head width, not {self.width // self.heads}")
        if self.filter_norm and not self.filters:
            raise ValueError("filter_norm = true without a filter on q, k or v")
        return self

    @property
    def filters(self) -> dict[str, int | Literal["full"]]:
        """Stream -> taps, the streams without a filter left out."""
        return {stream: taps for stream in "qkv" if (taps := getattr(self, stream)) is not None}

    @property
    def filtered(self) -> bool:
        return bool(self.filters)

    def check_length(self, length: int) -> None:
        for stream, taps in self.filters.items():
            if taps != "full" and taps > length:
                raise ValueError(f"{stream} = {taps} taps is longer than the training length of {length}")

    def longest(self, length: int) -> int | None:
        return length if self.position == "learned" else None


class Attention(AttentionModel):
    """Softmax attention, dense and causal. Without a filter it is the transformer, with filters it is CAT."""

    mixer: Literal["attention"]


class Linear(AttentionModel):
    """Linear attention, elu + 1: with filters it is LinCAT."""

    mixer: Literal["linear"]

    @model_validator(mode="after")
    def _no_alibi(self) -> Self:
        if self.position == "alibi":
            raise ValueError("alibi position is added to the scores before a softmax, and linear attention has none")
        return self


class Landmark(AttentionModel):
    """Softmax attention over the query's own block of tokens and the earlier blocks whose landmarks match it best."""

    mixer: Literal["landmark"]
    block: Count
    """Tokens of a block; the filtered key of its last token is its landmark."""
    top: Count
    """Blocks that a query retrieves."""

    @model_validator(mode="after")
    def _no_alibi(self) -> Self:
        if self.position == "alibi":
            raise ValueError("alibi position makes landmarks compete by distance, not by content; landmark attention has none")
        return self

    def check_length(self, length: int) -> None:
        super().check_length(length)
        if self.block > length:
            raise ValueError(f"block = {self.block} is longer than the training length of {length}")


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


ModelConfiguration = Annotated[Attention | Linear | Landmark | Mamba, Field(discriminator="mixer")]
"""Every kind of model there is."""


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
    learning_rates: Annotated[tuple[Annotated[float, Field(gt=0, le=1)], ...], Field(min_length=1, strict=False)]
    """Peaks to try; the validation split chooses one for all seeds of a variant."""

    @model_validator(mode="after")
    def _rates_differ(self) -> Self:
        if len(set(self.learning_rates)) < len(self.learning_rates):
            raise ValueError(f"learning_rates = {list(self.learning_rates)} has a value twice")
        return self
