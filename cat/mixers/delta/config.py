"""Configuration of the delta rule."""

from __future__ import annotations

from typing import ClassVar

from cat.config import QKVConfig


class DeltaConfig(QKVConfig):
    """A linear recurrence with the delta rule.

    Each token corrects the value that the state stores for its key. Queries and keys always have unit length. There are no
    positions: they would rotate the keys that the rule compares.
    """

    label: ClassVar = "DeltaNet"
    gate: bool = False
    """Let the state decay by a factor that depends on the token."""
