"""Configuration of Performer."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from cat.config import Count, QKVConfig


class PerformerConfig(QKVConfig):
    """Linear attention with positive random features, drawn once at initialization."""

    mixer: Literal["performer"]
    features: Count
    """Random features per head."""

    @model_validator(mode="after")
    def _no_alibi(self) -> Self:
        return self._refuse_alibi("needs a softmax, which random features replace")
