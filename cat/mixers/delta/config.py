"""Configuration of the delta rule."""

from __future__ import annotations

from typing import ClassVar, Literal

from cat.config import FilterInit, KernelSize, QKVConfig


class DeltaConfig(QKVConfig):
    """A linear recurrence with the delta rule; by default Gated DeltaNet.

    Each token corrects the value that the state stores for its key. Queries and keys always have unit length. There are no
    positions: they would rotate the keys that the rule compares. DeltaNet (arXiv 2406.06484) is `gate: false` with
    `output_gate: false`.
    """

    label: ClassVar = "DeltaNet"
    paper: ClassVar = "arXiv 2412.06464"
    differs: ClassVar = "values are as wide as keys, not twice as wide, and the heads together have the width of the model"
    conv_q: KernelSize | None = 4
    conv_k: KernelSize | None = 4
    conv_v: KernelSize | None = 4
    sharing: Literal["head", "channel", "mixing"] = "channel"
    filter_init: FilterInit = "uniform"
    conv_activation: Literal["none", "silu"] = "silu"
    gate: bool = True
    """Let the state decay by a factor that depends on the token."""
    output_gate: bool = True
    """Multiply the normalized output of each head by one gate per channel, computed from the query's token."""

    @property
    def title(self) -> str:
        return f"Gated {self.label}" if self.gate else self.label
