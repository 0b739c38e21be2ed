"""Configuration of Based."""

from __future__ import annotations

from typing import ClassVar, Self

from pydantic import model_validator

from cat.config import Count, DotProductConfig


class BasedConfig(DotProductConfig):
    """Linear attention with the features of the second-order Taylor polynomial of exp.

    The model of the paper alternates it with gated short convolutions and attention within a window:
    `mixer: [gated_conv, {mixer: attention, window: 16}, based]`.
    """

    paper: ClassVar = "arXiv 2402.18668"
    feature_width: Count | None = 16
    """Channels of queries and keys per head; None: the number of the values."""
    window: Count | None = None
    """Tokens with exact attention in the same layer: the current token and those immediately before it; None: no token."""

    @model_validator(mode="after")
    def _no_alibi(self) -> Self:
        return self._refuse_alibi("needs a softmax, which Taylor features replace")

    def channels_of(self, projection: str, width: int) -> int:
        channels = super().channels_of(projection, width)
        return channels if self.feature_width is None or projection == "v" else self.feature_width

    def check_length(self, length: int) -> None:
        super().check_length(length)
        if self.window is not None and self.window >= length:
            raise ValueError(f"window = {self.window} must be smaller than the training length of {length}")
