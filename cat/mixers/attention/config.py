"""Configuration of softmax attention."""

from __future__ import annotations

from typing import Literal

from cat.config import QKVConfig


class AttentionConfig(QKVConfig):
    """Dense causal softmax attention: the transformer, or CAT with convolutions."""

    mixer: Literal["attention"]

    @property
    def only_keys_convolved(self) -> bool:
        """Whether one kernel per head on the keys decides recall.

        True for one layer without other convolutions, positions or qk_norm.
        """
        bare = (self.layers, self.position, self.qk_norm) == (1, "none", False)
        return bare and self.kernel_sizes.keys() == {"k"} and self.sharing == "head" and not self.filter_bias
