"""Configuration of gated linear attention."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from cat.config import Count, QKVConfig


class GLAConfig(QKVConfig):
    """Linear attention without a feature map, with a decay per state channel.

    The decay depends on the token.
    """

    mixer: Literal["gla"]
    gate_rank: Count
    """Rank of the linear map from a token to the decay of each channel."""
    output_gate: bool = False
    """Multiply the output of each head by one gate per channel, computed from the query's token."""

    @property
    def has_attention(self) -> bool:
        return False  # weights can be negative and have any sum

    @model_validator(mode="after")
    def _rank_is_at_most_width(self) -> Self:
        if self.gate_rank > self.width:
            raise ValueError(f"gate_rank = {self.gate_rank} must be at most width = {self.width}")
        return self

    @model_validator(mode="after")
    def _no_softmax_settings(self) -> Self:
        if self.position == "rotary":
            problem = "position = rotary would rotate channels that decay at different rates"
            raise ValueError(f"{problem}. Fix: use none, learned or sinusoidal")
        if self.qk_norm or self.temperature:
            key = "qk_norm" if self.qk_norm else "temperature"
            reason = "gated linear attention normalizes its output, which cancels a temperature"
            raise ValueError(f"{key} = true: {reason}. Fix: remove it")
        return self._refuse_alibi("needs a softmax, which gated linear attention does not have")
