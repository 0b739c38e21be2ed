"""Configuration of gated linear attention."""

from __future__ import annotations

from typing import ClassVar, Literal

from cat.config import Count, QKVConfig


class GLAConfig(QKVConfig):
    """Linear attention without a feature map, with a decay per state channel.

    The decay depends on the token. There are no positions: they would rotate channels that decay at different rates. There is no
    temperature: the output is normalized, which cancels it. The recipe with short convolutions of the authors' library is
    `conv_q: 4, conv_k: 4, conv_v: 4, sharing: channel, filter_init: uniform, conv_activation: silu`.
    """

    label: ClassVar = "GLA"
    paper: ClassVar = "arXiv 2312.06635"
    key_width: Literal["half", "full"] = "half"
    """Channels of queries and keys: half the number of the values, or the full number."""
    gate_rank: Count = 16
    """Rank of the linear map from a token to the decay of each channel."""
    output_gate: bool = True
    """Multiply the output of each head by one gate per channel, computed from the query's token."""

    def check_width(self, width: int) -> None:
        super().check_width(width)
        if self.gate_rank > width:
            raise ValueError(f"gate_rank = {self.gate_rank} must be at most width = {width}")
        if self.key_width == "half" and (width // self.heads) % 2:
            raise ValueError(f"key_width = half needs an even head width, not {width // self.heads}")

    def channels_of(self, projection: str, width: int) -> int:
        channels = width // self.heads
        return channels // 2 if self.key_width == "half" and projection != "v" else channels
