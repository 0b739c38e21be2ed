"""Configuration of Mamba."""

from __future__ import annotations

from typing import Literal

from cat.config import Count, Model


class Mamba(Model):
    """A selective state space behind a short convolution; no heads, no positions, no attention."""

    mixer: Literal["mamba"]
    expand: Count = 2
    """Channels of the state space as a multiple of `width`."""
    state: Count = 16
    """Numbers of state a channel."""
    conv: Count = 4
    """Taps of its convolution, one filter a channel."""

    def check_length(self, length: int) -> None:
        if self.conv > length:
            raise ValueError(f"conv = {self.conv} taps reach past the training length of {length}")
