"""Associative recall and its N-gram form, with one question or many (arXiv 2407.05591, section 3; MQAR: 2312.04927).

A context of key-value pairs, each key an N-gram over a small alphabet shared by all keys, then keys again: the answer to a
key is the value that followed it. N = 1 is associative recall.

    one question:    BOS  . . a b V . . . c d W . . .  c d         asks W at the last token
    many questions:  BOS  a b V c d W  . . . c d . a b . . . .     asks W and V, each at the last token of its key

A dot is a filler token. Keys, values and filler have tokens of their own, so an N-gram of key tokens is a whole key, and a
key stands once in the context and is asked once: every question has one answer.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from cat.config import Count
from cat.tasks.base import IGNORE, Examples, Task, draw_distinct

BOS = 0


class Recall(Task):
    """Sizes of a recall task. Longer splits ask proportionally more pairs, up to the number of N-grams; then filler grows."""

    renamed_keys: ClassVar = {**Task.renamed_keys, "questions": "queries", "gaps": "query_gap"}
    kind: Literal["recall"]
    ngram: Annotated[int, Field(ge=1, le=8)]
    """N: tokens of a key."""
    keys: Count
    """Size of the key alphabet; keys are drawn from its N-grams. Small for N > 1, or one token gives the key away."""
    values: Count
    """Size of the value alphabet."""
    filler: Count
    """Size of the filler alphabet; 1 is a blank."""
    pairs: Count
    """Key-value pairs in a training sequence."""
    queries: Literal["one", "all"]
    """Ask one key at the last token, or every key."""
    query_gap: Literal["uniform", "power"]
    """How far a question is from its key: uniformly, or by the power law g^-0.99, near more often than far."""

    @model_validator(mode="after")
    def _pairs_fit(self) -> Self:
        capacity = self.keys**self.ngram
        if capacity >= 2**62:
            raise ValueError(f"keys = {self.keys} have more {self.ngram}-grams than fit a 64-bit number")
        if self.pairs > capacity:
            raise ValueError(f"pairs = {self.pairs} is more than the {capacity} {self.ngram}-grams over keys = {self.keys}")
        for length in self.lengths:
            pairs = self.pairs_at(length)
            if pairs < 1 or length < self._shortest(pairs):
                raise ValueError(
                    f"a sequence of {length} tokens cannot hold {max(1, pairs)} pairs and their questions,"
                    f" which take {self._shortest(max(1, pairs))}"
                )
        return self

    @property
    def vocabulary(self) -> int:
        return 1 + self.keys + self.values + self.filler

    def pairs_at(self, length: int) -> int:
        """Pairs in a sequence of `length` tokens: in proportion to the training length, as far as there are N-grams."""
        return min(self.pairs * length // self.length, self.keys**self.ngram)

    def _shortest(self, pairs: int) -> int:
        slot = self.ngram + 1
        return 1 + pairs * slot + (pairs * slot if self.queries == "all" else self.ngram)

    def examples(self, split: str, length: int, count: int, generator: np.random.Generator) -> Examples:
        """The splits differ by their generator alone."""
        pairs, n, slot = self.pairs_at(length), self.ngram, self.ngram + 1
        keys = draw_distinct(generator, count, pairs, self.keys**n)
        # The N-gram with number m is m written in base |A|.
        ngrams = keys[..., None] // self.keys ** np.arange(n - 1, -1, -1) % self.keys + 1
        values = generator.integers(0, self.values, size=(count, pairs)) + 1 + self.keys
        inputs = generator.integers(0, self.filler, size=(count, length)) + 1 + self.keys + self.values
        inputs[:, 0] = BOS
        targets = np.full((count, length), IGNORE, dtype=np.int64)

        if self.queries == "one":
            # Gaps are counted back from the question: pair 0 is asked.
            where = length - n - (1 + self._places(generator, count, pairs, (length - 1 - n) // slot)) * slot
            self._write(inputs, where, ngrams, values)
            inputs[:, -n:] = ngrams[:, 0]
            targets[:, -1] = values[:, 0]
        else:
            # The context begins right after BOS at every length, or the first pair of a longer sequence would look new.
            self._write(inputs, np.broadcast_to(1 + np.arange(pairs) * slot, (count, pairs)), ngrams, values)
            where = 1 + (pairs + self._places(generator, count, pairs, (length - 1) // slot - pairs)) * slot
            self._write(inputs, where, ngrams, None)
            np.put_along_axis(targets, where + n - 1, values, axis=1)
        return Examples(inputs, targets)

    def answer_positions(self, examples: Examples) -> np.ndarray:
        """The value that follows the first occurrence of the key that is asked."""
        tokens, n = np.asarray(examples.inputs, dtype=np.int64), self.ngram
        ends = np.lib.stride_tricks.sliding_window_view(tokens, n, axis=1)
        # The number of the N-gram that ends at a token; -1 where it is not all of key tokens, which are 1 .. keys.
        numbers = np.full_like(tokens, -1)
        numbers[:, n - 1 :] = ((ends - 1) * self.keys ** np.arange(n - 1, -1, -1)).sum(-1)
        numbers[:, n - 1 :][((ends < 1) | (ends > self.keys)).any(-1)] = -1
        sources = np.full_like(tokens, -1)
        rows, asked = np.nonzero(np.asarray(examples.targets) >= 0)
        sources[rows, asked] = (numbers[rows] == numbers[rows, asked][:, None]).argmax(1) + 1
        return sources

    def check_theorem(self) -> None:
        if self.ngram > 4:
            raise ValueError(f"ngram = {self.ngram} needs scores that 32-bit numbers do not tell apart; up to 4 is prescribed")
        self._check_width()

    def _places(self, generator: np.random.Generator, rows: int, count: int, slots: int) -> np.ndarray:
        """`count` different slots a row, drawn in turn with weights w: the order of exponential variables over w."""
        weight = np.arange(1.0, slots + 1) ** (-0.99 if self.query_gap == "power" else 0.0)
        arrival = generator.standard_exponential((rows, slots)) / weight
        return np.argsort(arrival, axis=1, kind="stable")[:, :count]

    def _write(self, inputs: np.ndarray, at: np.ndarray, ngrams: np.ndarray, values: np.ndarray | None) -> None:
        for offset in range(self.ngram):
            np.put_along_axis(inputs, at + offset, ngrams[..., offset], axis=1)
        if values is not None:
            np.put_along_axis(inputs, at + self.ngram, values, axis=1)
