"""Configuration of landmark attention."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import model_validator

from cat.config import Count, KernelSize, QKVConfig


class LandmarkConfig(QKVConfig):
    """Softmax attention over the query's own block of tokens and the earlier blocks whose landmarks match it best."""

    projections: ClassVar[tuple[str, ...]] = ("q", "k", "v", "summary")
    renamed_keys: ClassVar = {**QKVConfig.renamed_keys, "summary": "conv_summary"}
    mixer: Literal["landmark"]
    block: Count
    """Tokens of a block."""
    top: Count
    """Blocks that a query retrieves."""
    conv_summary: KernelSize | None = None
    """The filter that sums up the filtered keys of a block, at its last token; without it, that token's key is the landmark."""

    @model_validator(mode="after")
    def _no_alibi(self) -> Self:
        return self._refuse_alibi("makes landmarks compete by distance, not by content; landmark attention has none")

    def check_length(self, length: int) -> None:
        super().check_length(length)
        if self.block > length:
            raise ValueError(f"block = {self.block} is longer than the training length of {length}")
