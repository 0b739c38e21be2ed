"""Selective copying (arXiv 2407.05591, section 3): signal tokens among noise, a separator, then the signals again in order.

    BOS  . s . . t . u . .  SEP  s t         targets s t u, from the separator on

In the unique form each signal occurs at most once per sequence. A model is scored on its own continuation after the separator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal, Self

import numpy as np
from pydantic import model_validator

from cat.config import ConstructionPlacement, Count
from cat.tasks.base import IGNORE, Examples, Task, draw_distinct, guess_probability

BOS, SEPARATOR = 0, 1
CONSTRUCTIONS = ("q", "k")
"""Placements of constructions. `q` is the paper's."""


class Copying(Task):
    """Selective copying. Longer sequences have more noise and the same number of signals."""

    example: ClassVar = {"signals": 3, "alphabet": 5, "noise": 2, "unique": True}
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
    def label(self) -> str:
        return "selective copying"

    @property
    def autoregressive(self) -> bool:
        return True

    def context_at(self, length: int) -> int:
        """Tokens between BOS and the separator: signals and noise."""
        return length - 1 - self.signals

    def answer_positions(self, examples: Examples) -> np.ndarray:
        """At each target position, the position of the next signal in the context."""
        targets = np.asarray(examples.targets)
        positions = np.full(targets.shape, -1)
        positions[targets >= 0] = np.nonzero(self._is_signal(examples))[1]
        return positions

    def oracle(self, examples: Examples) -> np.ndarray:
        """From the separator on, the signals of the context in order."""
        targets = np.full(examples.inputs.shape, IGNORE, dtype=np.int64)
        context = examples.inputs[:, : -self.signals]
        targets[:, -self.signals :] = context[self._is_signal(examples)].reshape(-1, self.signals)
        return targets

    @property
    def reference_labels(self) -> dict[str, str]:
        return {"any_signal": "guess a signal of the context", "any_uncopied": "guess a signal not yet copied, after right ones"}

    def any_signal(self, examples: Examples) -> np.ndarray:
        """Guess any signal of the context: the most frequent one, because it is right most often."""
        return self._guess(examples, lambda place, step: place >= 0)

    def any_uncopied(self, examples: Examples) -> np.ndarray:
        """Guess any signal that is not yet copied, if all signals so far were copied rightly."""
        return self._guess(examples, lambda place, step: place >= step)

    def _guess(self, examples: Examples, is_candidate: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> np.ndarray:
        """The probability to find each answer, N x L, if candidates are the signals at certain places of the order.

        `is_candidate` says for the place of a signal and the step of copying, both from 0, whether the signal is one.
        """
        targets = np.asarray(examples.targets, dtype=np.int64)
        signals = targets[targets >= 0].reshape(-1, self.signals)
        row, step, place = np.indices((len(signals), self.signals, self.signals))
        chosen = is_candidate(place, step)
        known = np.column_stack([row[chosen], step[chosen]])
        asked = np.column_stack([row[:, :, 0].ravel(), step[:, :, 0].ravel()])
        found = np.zeros(targets.shape)
        found[targets >= 0] = guess_probability(known, signals[row, place][chosen], asked, signals.ravel())
        return found

    def _is_signal(self, examples: Examples) -> np.ndarray:
        """Whether each token before the separator is a signal, N x context."""
        context = np.asarray(examples.inputs)[:, : -self.signals]
        return (context >= 2) & (context < 2 + self.alphabet)

    def check_construction(self, placement: ConstructionPlacement | None = None) -> None:
        if placement is not None and placement not in CONSTRUCTIONS:
            raise ValueError(f"no construction with placement = {placement} solves copying")
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
