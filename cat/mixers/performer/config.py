"""Configuration of Performer."""

from __future__ import annotations

import math
from typing import ClassVar, Self

from pydantic import model_validator

from cat.config import Count, DotProductConfig


class PerformerConfig(DotProductConfig):
    """Linear attention with positive random features, drawn once at initialization."""

    paper: ClassVar = "arXiv 2009.14794"
    differs: ClassVar = "random features are drawn once; the authors draw them again during training"
    features: Count | None = None
    """Random features per head; None: C ln C for C channels per head."""

    def count_features(self, width: int) -> int:
        """Return the random features per head in a model with `width` channels."""
        channels = width // self.heads
        return self.features or max(1, int(channels * math.log(channels)))

    @model_validator(mode="after")
    def _no_alibi(self) -> Self:
        return self._refuse_alibi("needs a softmax, which random features replace")
