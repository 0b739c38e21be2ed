"""Configuration of the delta rule."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from cat.config import QKVConfig


class DeltaConfig(QKVConfig):
    """A linear recurrence by the delta rule: each token corrects what the state holds under its key."""

    mixer: Literal["delta"]
    gate: bool = False
    """Let the state decay by a share that each token decides."""

    @property
    def has_attention(self) -> bool:
        return False  # weights of either sign, and of any sum

    @model_validator(mode="after")
    def _no_scores(self) -> Self:
        if self.position == "rotary":
            raise ValueError("rotary position turns keys that the delta rule compares; use none, learned or sinusoidal")
        if self.qk_norm or self.temperature:
            key = "qk_norm" if self.qk_norm else "temperature"
            raise ValueError(f"{key} = true: the delta rule has unit keys and queries always, and no temperature")
        return self._refuse_alibi("is added to the scores before a softmax, and the delta rule has none")
