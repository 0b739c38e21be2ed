"""Configuration of the gated convolution."""

from __future__ import annotations

from typing import ClassVar, Literal

from cat.config import Count, MixerConfig


class GatedConvConfig(MixerConfig):
    """A causal convolution per channel, times a gate: the BaseConv layer of Based.

    Without the gate it is only a convolution, the control for gated mixers.
    """

    label: ClassVar = "Gated convolution"
    paper: ClassVar = "arXiv 2402.18668"
    renamed_keys: ClassVar = {"conv": "conv_size"}
    conv_size: Count | Literal["full"] = 3
    """Kernel size; `full` is the training length."""
    expand: Count = 2
    """Channels of the convolution as a multiple of `width`."""
    gate: bool = True
    """Multiply the convolved channels by a linear map of the token."""

    @property
    def title(self) -> str:
        return self.label if self.gate else "Convolution"

    @property
    def selects_tokens(self) -> bool:
        return self.conv_size != "full"

    def check_length(self, length: int) -> None:
        if self.conv_size != "full" and self.conv_size > length:
            raise ValueError(f"conv_size = {self.conv_size} is longer than the training length of {length}")
