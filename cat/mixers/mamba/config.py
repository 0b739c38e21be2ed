"""Configuration of Mamba."""

from __future__ import annotations

from typing import ClassVar, Literal

from cat.config import Count, ModelConfig


class MambaConfig(ModelConfig):
    """A selective state space behind a short convolution; no heads, no positions, no attention."""

    renamed_keys: ClassVar = {"conv": "conv_size"}
    mixer: Literal["mamba"]
    expand: Count = 2
    """Channels of the state space as a multiple of `width`."""
    state: Count = 16
    """Numbers of state a channel."""
    conv_size: Count = 4
    """Taps of its convolution, one filter a channel."""

    def check_length(self, length: int) -> None:
        if self.conv_size > length:
            raise ValueError(f"conv_size = {self.conv_size} taps reach past the training length of {length}")
