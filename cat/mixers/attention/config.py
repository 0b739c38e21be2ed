"""Configuration of softmax attention."""

from __future__ import annotations

from typing import Literal

from cat.config import QKVConfig


class AttentionConfig(QKVConfig):
    """Softmax attention, dense and causal. Without a filter it is the transformer, with filters it is CAT."""

    mixer: Literal["attention"]

    @property
    def only_keys_convolved(self) -> bool:
        """Whether recall hangs on one filter a head, on the keys: one layer, no other filter, no positions, no qk_norm."""
        bare = (self.layers, self.position, self.qk_norm) == (1, "none", False)
        return bare and self.kernel_sizes.keys() == {"k"} and self.sharing == "head" and not self.filter_bias
