"""Configuration of linear attention."""

from __future__ import annotations

from typing import ClassVar, Self

from pydantic import model_validator

from cat.config import DotProductConfig


class LinearConfig(DotProductConfig):
    """Linear attention with the feature map elu + 1; with convolutions it is LinCAT."""

    label: ClassVar = "Linear attention"
    paper: ClassVar = "arXiv 2006.16236"
    label_with_convolution: ClassVar = "LinCAT"

    @property
    def has_attention(self) -> bool:
        return self.position != "rotary"  # rotated features can have negative products

    @model_validator(mode="after")
    def _no_alibi(self) -> Self:
        return self._refuse_alibi("needs a softmax, which linear attention does not have")
