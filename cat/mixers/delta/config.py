"""Configuration of the delta rule."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from cat.config import QKVConfig


class DeltaConfig(QKVConfig):
    """A linear recurrence with the delta rule.

    Each token corrects the value that the state stores for its key.
    """

    mixer: Literal["delta"]
    gate: bool = False
    """Let the state decay by a factor that depends on the token."""

    @property
    def has_attention(self) -> bool:
        return False  # weights can be negative and have any sum

    @model_validator(mode="after")
    def _no_softmax_settings(self) -> Self:
        if self.position == "rotary":
            problem = "position = rotary would rotate the keys that the delta rule compares"
            raise ValueError(f"{problem}. Fix: use none, learned or sinusoidal")
        if self.qk_norm or self.temperature:
            key = "qk_norm" if self.qk_norm else "temperature"
            raise ValueError(f"{key} = true: the delta rule always has unit queries and keys, and no temperature. Fix: remove it")
        return self._refuse_alibi("needs a softmax, which the delta rule does not have")
