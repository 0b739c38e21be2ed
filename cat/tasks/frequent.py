"""Frequent tokens: a sequence, a separator, then its most frequent tokens, the most frequent first. A proxy for summarization.

    BOS  b a c a b a c a b a  SEP  a b        targets a b c, from the separator on

Each of these tokens occurs more often than the next by at least a margin, and the last of them more often than all other tokens
by the same margin. So the order is certain. A model is scored on its own continuation after the separator.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Self

import numpy as np
from pydantic import model_validator

from cat.config import Count
from cat.tasks.base import IGNORE, Examples, Task

BOS, SEPARATOR = 0, 1
FIRST_TOKEN = 2


class Frequent(Task):
    """Frequent tokens. In longer sequences, counts and margin are proportionally larger."""

    example: ClassVar = {"top": 3, "alphabet": 7, "margin": 2}
    kind: Literal["frequent"]
    top: Count
    """Number of tokens to name."""
    alphabet: Count
    """Number of distinct tokens; all but the most frequent ones are equally likely."""
    margin: Count
    """Smallest difference of two counts in a row, at the training length; at other lengths proportionally large, at least 1."""

    @model_validator(mode="after")
    def _check_counts(self) -> Self:
        if self.top >= self.alphabet:
            raise ValueError(f"top = {self.top} must be smaller than alphabet = {self.alphabet}")
        for length in self.generated_lengths:
            if self.context_at(length) < self._reserved(length):
                needed = 1 + self._reserved(length) + self.top
                raise ValueError(f"length {length} is too short for top = {self.top} and this margin, which need {needed} tokens")
        return self

    @property
    def vocabulary(self) -> int:
        return FIRST_TOKEN + self.alphabet

    @property
    def label(self) -> str:
        return "frequent tokens"

    @property
    def autoregressive(self) -> bool:
        return True

    def context_at(self, length: int) -> int:
        """Tokens between BOS and the separator."""
        return length - 1 - self.top

    def margin_at(self, length: int) -> int:
        """Smallest difference between the counts of a frequent token and the next, in sequences of `length` tokens."""
        return max(1, self.margin * length // self.length)

    def _reserved(self, length: int) -> int:
        """Tokens that the margins need: the i-th most frequent of M tokens occurs at least M + 1 - i margins often."""
        return self.margin_at(length) * self.top * (self.top + 1) // 2

    def examples(self, split: str, length: int, count: int, generator: np.random.Generator) -> Examples:
        """The splits differ only in their generator."""
        context, size = self.context_at(length), self.alphabet
        drawn = generator.multinomial(context - self._reserved(length), np.full(size, 1 / size), size=count)
        counts = -np.sort(-drawn, axis=1)
        counts[:, : self.top] += self.margin_at(length) * np.arange(self.top, 0, -1)
        tokens = generator.permuted(np.broadcast_to(np.arange(size), (count, size)), axis=1) + FIRST_TOKEN
        inputs = np.empty((count, length), dtype=np.int64)
        inputs[:, 0] = BOS
        repeated = np.repeat(tokens.ravel(), counts.ravel()).reshape(count, context)
        inputs[:, 1 : 1 + context] = generator.permuted(repeated, axis=1)
        inputs[:, 1 + context] = SEPARATOR
        inputs[:, 2 + context :] = tokens[:, : self.top - 1]
        targets = np.full((count, length), IGNORE, dtype=np.int64)
        targets[:, -self.top :] = tokens[:, : self.top]
        return Examples(inputs, targets)

    def oracle(self, examples: Examples) -> np.ndarray:
        """From the separator on, the tokens of the context by falling count."""
        targets = np.full(examples.inputs.shape, IGNORE, dtype=np.int64)
        targets[:, -self.top :] = np.argsort(-self._counts(examples), axis=1, kind="stable")[:, : self.top]
        return targets

    @property
    def reference_labels(self) -> dict[str, str]:
        labels = {
            "in_proportion": "guess a token in proportion to its count, after right ones",
            "last_repeated": "the last repeated token, after right ones",
        }
        if self.top >= 2:
            labels["unordered"] = "find the frequent tokens without their order, after right ones"
        return labels

    def in_proportion(self, examples: Examples) -> np.ndarray:
        """Copy a token from a random position of the context that holds no token named before."""
        answers = self._answers(examples)
        counts = np.take_along_axis(self._counts(examples), answers, axis=1)
        before = np.cumsum(counts, axis=1) - counts
        return self._spread(counts / (self.context_at(examples.inputs.shape[1]) - before), examples)

    def last_repeated(self, examples: Examples) -> np.ndarray:
        """The last token of the context that occurs at least twice and was not named before."""
        context, answers, counts = self._context(examples), self._answers(examples), self._counts(examples)
        candidate = np.take_along_axis(counts, context, axis=1) >= 2
        found = np.zeros(answers.shape)
        for step in range(self.top):
            last = candidate.shape[1] - 1 - candidate[:, ::-1].argmax(axis=1)[:, None]
            is_answer = np.take_along_axis(context, last, axis=1) == answers[:, step : step + 1]
            found[:, step] = (is_answer & np.take_along_axis(candidate, last, axis=1))[:, 0]
            candidate &= context != answers[:, step : step + 1]
        return self._spread(found, examples)

    def unordered(self, examples: Examples) -> np.ndarray:
        """Guess among the most frequent tokens that were not named before."""
        return self._spread(np.broadcast_to(1 / np.arange(self.top, 0, -1), self._answers(examples).shape), examples)

    def _spread(self, of_answers: np.ndarray, examples: Examples) -> np.ndarray:
        found = np.zeros(examples.inputs.shape)
        found[:, -self.top :] = of_answers
        return found

    def _answers(self, examples: Examples) -> np.ndarray:
        return np.asarray(examples.targets, dtype=np.int64)[:, -self.top :]

    def _context(self, examples: Examples) -> np.ndarray:
        return np.asarray(examples.inputs, dtype=np.int64)[:, 1 : -self.top]

    def _counts(self, examples: Examples) -> np.ndarray:
        """How often each token of the vocabulary occurs in the context, N x vocabulary."""
        context = self._context(examples)
        flat = context + self.vocabulary * np.arange(len(context))[:, None]
        return np.bincount(flat.ravel(), minlength=len(context) * self.vocabulary).reshape(len(context), self.vocabulary)
