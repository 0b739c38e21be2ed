"""Configuration of Performer."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from cat.config import Count, QKVConfig


class PerformerConfig(QKVConfig):
    """Linear attention with positive random features of exp, drawn once with the weights."""

    mixer: Literal["performer"]
    features: Count
    """Random features a head."""

    @model_validator(mode="after")
    def _no_alibi(self) -> Self:
        return self._refuse_alibi("is added to the scores before a softmax, and random features have none")
