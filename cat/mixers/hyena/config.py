"""Configuration of Hyena."""

from __future__ import annotations

from typing import Annotated, ClassVar, Self

from pydantic import Field, model_validator

from cat.config import Count, MixerConfig


class HyenaConfig(MixerConfig):
    """A gated long convolution, q * long(k * v), after short ones on q, k and v: Hyena of order 2."""

    paper: ClassVar = "arXiv 2302.10866"
    differs: ClassVar = "features of the lag are fixed, and the network has the rate and weight decay of linear maps"
    renamed_keys: ClassVar = {"conv": "conv_size"}
    conv_size: Count = 3
    """Kernel size of the short convolutions; one kernel per channel."""
    filter_size: Count = 64
    """Hidden units per layer of the network that generates the long kernel."""
    filter_layers: Count = 3
    """Hidden layers of this network."""
    filter_features: Annotated[int, Field(ge=3, lt=2**31)] = 3
    """Features of the lag that it is given: the lag itself, and cosine and sine of bands of frequencies; an odd number."""

    @model_validator(mode="after")
    def _features_are_odd(self) -> Self:
        if self.filter_features % 2 == 0:
            raise ValueError(f"filter_features = {self.filter_features} must be odd: the lag, and pairs of cosine and sine")
        return self

    def check_length(self, length: int) -> None:
        if self.conv_size > length:
            raise ValueError(f"conv_size = {self.conv_size} is longer than the training length of {length}")
