"""Configuration of gated linear attention."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from cat.config import Count, QKVConfig


class GLAConfig(QKVConfig):
    """Linear attention without a feature map, each channel of whose state decays by a share that each token decides."""

    mixer: Literal["gla"]
    gate_rank: Count
    """Rank of the map from a token to what it leaves of each channel."""
    output_gate: bool = False
    """Multiply what a head has read by a gate a channel, of the token that reads it."""

    @property
    def has_attention(self) -> bool:
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
