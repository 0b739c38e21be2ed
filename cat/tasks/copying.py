"""Selective copying: signal tokens scattered among noise, a separator, then the signals again, in order (2407.05591, section 3).

    BOS  . s . . t . u . .  SEP  s t         asks s t u, from the separator on

In the unique form each signal occurs once in a sequence. A model is scored on its own continuation of the separator.
"""

from __future__ import annotations

from typing import Literal, Self

import numpy as np
from pydantic import model_validator

from cat.config import Count
from cat.tasks.base import IGNORE, Examples, Task, draw_distinct

BOS, SEPARATOR = 0, 1


class Copying(Task):
    """Sizes of a selective-copying task. Longer splits have more noise and as many signals."""

    kind: Literal["copying"]
    signals: Count
    """Signals to copy in each sequence."""
    alphabet: Count
    """Different signal tokens."""
    noise: Count
    """Different noise tokens."""
    unique: bool
    """Whether each signal occurs at most once in a sequence."""

    @model_validator(mode="after")
    def _signals_fit(self) -> Self:
        if self.unique and self.signals > self.alphabet:
            raise ValueError(f"signals = {self.signals} unique signals need an alphabet of as many, not {self.alphabet}")
        for length in self.lengths:
            if self.context_at(length) < self.signals:
                raise ValueError(f"a sequence of {length} tokens cannot hold signals = {self.signals} twice and the separator")
        return self

    @property
    def vocabulary(self) -> int:
        return 2 + self.alphabet + self.noise

    @property
    def autoregressive(self) -> bool:
        return True

    def context_at(self, length: int) -> int:
        """Tokens among which the signals are scattered: all but BOS, the separator, and the signals fed back."""
        return length - 1 - self.signals

    def answer_positions(self, examples: Examples) -> np.ndarray:
        """The signal of the context that is to come next."""
        inputs, targets = np.asarray(examples.inputs, dtype=np.int64), np.asarray(examples.targets)
        context = inputs.shape[1] - self.signals
        signal = (inputs[:, :context] >= 2) & (inputs[:, :context] < 2 + self.alphabet)
        sources = np.full_like(inputs, -1)
        sources[targets >= 0] = np.nonzero(signal)[1]
        return sources

    def check_theorem(self) -> None:
        if not self.unique:
            raise ValueError("the theorem about copying is about signals that occur once: unique: true")
        self._check_width()

    def examples(self, split: str, length: int, count: int, generator: np.random.Generator) -> Examples:
        """The splits differ by their generator alone."""
        context = self.context_at(length)
        if self.unique:
            signals = draw_distinct(generator, count, self.signals, self.alphabet) + 2
        else:
            signals = generator.integers(0, self.alphabet, size=(count, self.signals)) + 2
        inputs = np.empty((count, length), dtype=np.int64)
        inputs[:, 0] = BOS
        inputs[:, 1 : context + 1] = generator.integers(0, self.noise, size=(count, context)) + 2 + self.alphabet
        where = np.sort(draw_distinct(generator, count, self.signals, context), axis=1) + 1
        np.put_along_axis(inputs, where, signals, axis=1)
        inputs[:, context + 1] = SEPARATOR
        inputs[:, context + 2 :] = signals[:, :-1]
        targets = np.full((count, length), IGNORE, dtype=np.int64)
        targets[:, context + 1 :] = signals
        return Examples(inputs, targets)
