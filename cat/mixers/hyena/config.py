"""Configuration of Hyena."""

from __future__ import annotations

from typing import ClassVar

from cat.config import Count, MixerConfig


class HyenaConfig(MixerConfig):
    """A gated long convolution, q * long(k * v), after short ones on q, k and v."""

    renamed_keys: ClassVar = {"conv": "conv_size"}
    conv_size: Count
    """Kernel size of the short convolutions; one kernel per channel."""
    filter_size: Count
    """Hidden units of the network that generates the long kernel."""

    def check_length(self, length: int) -> None:
        if self.conv_size > length:
            raise ValueError(f"conv_size = {self.conv_size} is longer than the training length of {length}")
