"""Configuration of multi-token attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Self

from pydantic import Field, model_validator

from cat.config import Count, DotProductConfig


class MultiTokenConfig(DotProductConfig):
    """Softmax attention whose logits are convolved over queries and keys."""

    label: ClassVar = "Multi-token attention"
    label_with_convolution: ClassVar = "Multi-token CAT"
    query_kernel: Count = 6
    """Queries that a logit depends on: its own and those immediately before it."""
    key_kernel: Count = 11
    """Keys that a logit depends on: its own and equally many on each side."""
    head_groups: Count = 1
    """Heads per group whose attention weights are mixed after the softmax; 1: none are mixed."""
    head_norm: bool = True
    """Divide the output of each head by its root mean square, and multiply it by `depth_scale`."""
    depth_scale: Annotated[float, Field(gt=0)] = 0.8
    """Scale of the normalized outputs of the heads.

    In the paper, it is 0.2 + 0.6 exp(-0.3 n) in layer n = 0, 1, .. (1 - lambda_init of the Differential Transformer, arXiv
    2410.05258). A mixer does not know its layer: the default is that of the first one. A list of mixers can have other values.
    """

    @classmethod
    def unused_keys(cls, values: Mapping[str, Any]) -> set[str]:
        return super().unused_keys(values) | (set() if values.get("head_norm", True) else {"depth_scale"})

    @model_validator(mode="after")
    def _options_fit(self) -> Self:
        if self.key_kernel % 2 == 0:
            raise ValueError(f"key_kernel = {self.key_kernel} must be odd: as many keys before its own as after")
        if self.heads % self.head_groups:
            raise ValueError(f"head_groups = {self.head_groups} does not divide heads = {self.heads}")
        if not self.head_norm and self.depth_scale != type(self).model_fields["depth_scale"].default:
            raise ValueError(f"depth_scale = {self.depth_scale:g} needs head_norm = true")
        return self._refuse_alibi("needs logits of single tokens, which multi-token attention convolves")

    def check_length(self, length: int) -> None:
        super().check_length(length)
        for key in ("query_kernel", "key_kernel"):
            if (size := getattr(self, key)) > length:
                raise ValueError(f"{key} = {size} is longer than the training length of {length}")

    @property
    def has_attention(self) -> bool:
        """The norm changes the sum of the weights, and mixed weights may be negative."""
        return not self.head_norm and self.head_groups == 1
