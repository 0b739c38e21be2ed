"""Selective copying (arXiv 2407.05591, section 3): signal tokens among noise, a separator, then the signals again in order.

    BOS  . s . . t . u . .  SEP  s t         targets s t u, from the separator on

In the unique form each signal occurs at most once per sequence. A model is scored on its own continuation after the separator.
"""

from __future__ import annotations

from typing import Literal, Self

import numpy as np
from pydantic import model_validator

from cat.config import Count
from cat.tasks.base import IGNORE, Examples, Task, draw_distinct

BOS, SEPARATOR = 0, 1


class Copying(Task):
    """Selective copying. Longer sequences have more noise and the same number of signals."""

    kind: Literal["copying"]
    signals: Count
    """Signals per sequence."""
    alphabet: Count
    """Number of distinct signal tokens."""
    noise: Count
    """Number of distinct noise tokens."""
    unique: bool
    """Whether each signal occurs at most once per sequence."""

    @model_validator(mode="after")
    def _check_signals(self) -> Self:
        if self.unique and self.signals > self.alphabet:
            raise ValueError(f"signals = {self.signals} exceeds alphabet = {self.alphabet}, but unique = true")
        for length in self.generated_lengths:
            if self.context_at(length) < self.signals:
                raise ValueError(f"length {length} is too short for signals = {self.signals} before and after the separator")
        return self

    @property
    def vocabulary(self) -> int:
        return 2 + self.alphabet + self.noise

    @property
    def autoregressive(self) -> bool:
        return True

    def context_at(self, length: int) -> int:
        """Tokens between BOS and the separator: signals and noise."""
        return length - 1 - self.signals

    def answer_positions(self, examples: Examples) -> np.ndarray:
        """At each target position, the position of the next signal in the context."""
        inputs, targets = np.asarray(examples.inputs, dtype=np.int64), np.asarray(examples.targets)
        context = inputs.shape[1] - self.signals
        is_signal = (inputs[:, :context] >= 2) & (inputs[:, :context] < 2 + self.alphabet)
        positions = np.full_like(inputs, -1)
        positions[targets >= 0] = np.nonzero(is_signal)[1]
        return positions

    def check_construction(self) -> None:
        if not self.unique:
            raise ValueError("the construction for copying needs unique = true")
        self._check_construction_vocabulary()

    def examples(self, split: str, length: int, count: int, generator: np.random.Generator) -> Examples:
        """The splits differ only in their generator."""
        context = self.context_at(length)
        if self.unique:
            signals = draw_distinct(generator, count, self.signals, self.alphabet) + 2
        else:
            signals = generator.integers(0, self.alphabet, size=(count, self.signals)) + 2
        inputs = np.empty((count, length), dtype=np.int64)
        inputs[:, 0] = BOS
        inputs[:, 1 : context + 1] = generator.integers(0, self.noise, size=(count, context)) + 2 + self.alphabet
        positions = np.sort(draw_distinct(generator, count, self.signals, context), axis=1) + 1
        np.put_along_axis(inputs, positions, signals, axis=1)
        inputs[:, context + 1] = SEPARATOR
        inputs[:, context + 2 :] = signals[:, :-1]
        targets = np.full((count, length), IGNORE, dtype=np.int64)
        targets[:, context + 1 :] = signals
        return Examples(inputs, targets)
