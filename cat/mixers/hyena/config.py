"""Configuration of Hyena."""

from __future__ import annotations

from typing import Literal

from cat.config import Count, Model


class Hyena(Model):
    """A gated long convolution: queries times the convolution of keys times values, a short convolution in front of each."""

    mixer: Literal["hyena"]
    conv: Count
    """Taps of the short convolutions, one filter a channel."""
    filter_size: Count
    """Hidden units of the network that generates the taps of the long one."""

    def check_length(self, length: int) -> None:
        if self.conv > length:
            raise ValueError(f"conv = {self.conv} taps reach past the training length of {length}")
