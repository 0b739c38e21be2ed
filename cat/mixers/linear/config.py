"""Configuration of linear attention."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from cat.config import QKVConfig


class LinearConfig(QKVConfig):
    """Linear attention, elu + 1: with filters it is LinCAT."""

    mixer: Literal["linear"]

    @property
    def has_attention(self) -> bool:
        return self.position != "rotary"  # features that are turned multiply to weights of either sign

    @model_validator(mode="after")
    def _no_alibi(self) -> Self:
        return self._refuse_alibi("is added to the scores before a softmax, and linear attention has none")
