"""Configuration of gated linear attention."""

from __future__ import annotations

from typing import ClassVar

from cat.config import Count, QKVConfig


class GLAConfig(QKVConfig):
    """Linear attention without a feature map, with a decay per state channel.

    The decay depends on the token. There are no positions: they would rotate channels that decay at different rates. There is no
    temperature: the output is normalized, which cancels it.
    """

    label: ClassVar = "GLA"
    gate_rank: Count
    """Rank of the linear map from a token to the decay of each channel."""
    output_gate: bool = False
    """Multiply the output of each head by one gate per channel, computed from the query's token."""

    def check_width(self, width: int) -> None:
        super().check_width(width)
        if self.gate_rank > width:
            raise ValueError(f"gate_rank = {self.gate_rank} must be at most width = {width}")
