"""Configuration of Performer."""

from __future__ import annotations

from typing import Self

from pydantic import model_validator

from cat.config import Count, DotProductConfig


class PerformerConfig(DotProductConfig):
    """Linear attention with positive random features, drawn once at initialization."""

    features: Count
    """Random features per head."""

    @model_validator(mode="after")
    def _no_alibi(self) -> Self:
        return self._refuse_alibi("needs a softmax, which random features replace")
