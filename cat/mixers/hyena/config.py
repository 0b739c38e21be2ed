"""Configuration of Hyena."""

from __future__ import annotations

from typing import ClassVar, Literal

from cat.config import Count, ModelConfig


class HyenaConfig(ModelConfig):
    """A gated long convolution: queries times the convolution of keys times values, a short convolution in front of each."""

    renamed_keys: ClassVar = {"conv": "conv_size"}
    mixer: Literal["hyena"]
    conv_size: Count
    """Taps of the short convolutions, one filter a channel."""
    filter_size: Count
    """Hidden units of the network that generates the taps of the long one."""

    def check_length(self, length: int) -> None:
        if self.conv_size > length:
            raise ValueError(f"conv_size = {self.conv_size} taps reach past the training length of {length}")
