"""Configuration of Based."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from cat.config import Count, QKVConfig


class BasedConfig(QKVConfig):
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
