"""Configuration of Based."""

from __future__ import annotations

from typing import Self

from pydantic import model_validator

from cat.config import Count, DotProductConfig


class BasedConfig(DotProductConfig):
    """Softmax attention within a window, Taylor features for all earlier tokens.

    The features are those of the second-order Taylor polynomial of exp.
    """

    window: Count
    """Tokens with exact attention: the current token and those immediately before it."""

    @model_validator(mode="after")
    def _no_alibi(self) -> Self:
        return self._refuse_alibi("needs a softmax, which Taylor features replace")

    def check_length(self, length: int) -> None:
        super().check_length(length)
        if self.window >= length:
            raise ValueError(f"window = {self.window} must be smaller than the training length of {length}")
