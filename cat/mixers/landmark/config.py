"""Configuration of landmark attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal, Self

from pydantic import model_validator

from cat.config import Count, DotProductConfig, KernelSize


class LandmarkConfig(DotProductConfig):
    """Softmax attention to the query's own block and the best earlier blocks.

    The best blocks are those whose landmarks match the query best. This is the layer of arXiv 2407.05591, figure 3, with the
    grouped softmax of landmark attention (arXiv 2305.16300). That paper's landmarks are tokens of their own, and it trains on all
    blocks.
    """

    label: ClassVar = "Landmark attention"
    label_with_convolution: ClassVar = "Landmark CAT"
    projections: ClassVar[tuple[str, ...]] = ("q", "k", "v", "summary")
    renamed_keys: ClassVar = {**DotProductConfig.renamed_keys, "summary": "conv_summary"}
    block: Count
    """Tokens per block."""
    top: Count
    """Earlier blocks that each query retrieves."""
    train_on: Literal["chosen", "all"] = "chosen"
    """Blocks that a query attends to in training: those that it retrieves, or all earlier blocks, weighted by their landmarks."""
    conv_summary: KernelSize | None = None
    """Kernel size of the convolution whose output at a block's last token is the landmark; None: that token's key is.

    It acts on the convolved keys.
    """

    @property
    def selects_tokens(self) -> bool:
        return True

    @property
    def differs_in_training(self) -> bool:
        return self.train_on == "all"

    @model_validator(mode="after")
    def _no_alibi(self) -> Self:
        return self._refuse_alibi("would choose landmarks by distance instead of content")

    @property
    def init_sums(self) -> Mapping[str, int]:
        return {"summary": self.block}

    def check_length(self, length: int) -> None:
        super().check_length(length)
        if self.block > length:
            raise ValueError(f"block = {self.block} is longer than the training length of {length}")
