"""Configuration of Mamba."""

from __future__ import annotations

from typing import ClassVar

from cat.config import Count, MixerConfig


class MambaConfig(MixerConfig):
    """A selective state space model after a short convolution.

    It has no heads, positions or attention.
    """

    paper: ClassVar = "arXiv 2312.00752"
    differs: ClassVar = "the output projection does not start smaller in deeper models"
    renamed_keys: ClassVar = {"conv": "conv_size"}
    expand: Count = 2
    """Channels of the state space model as a multiple of `width`."""
    state: Count = 16
    """State size per channel."""
    conv_size: Count = 4
    """Kernel size of the convolution; one kernel per channel."""

    def check_length(self, length: int) -> None:
        if self.conv_size > length:
            raise ValueError(f"conv_size = {self.conv_size} is longer than the training length of {length}")
