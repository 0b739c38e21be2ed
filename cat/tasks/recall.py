"""Associative recall and N-gram recall with one query or many (arXiv 2407.05591, section 3; MQAR: arXiv 2312.04927).

A sequence has key-value pairs, then queries, which are keys again. Each key is an N-gram over one small alphabet. The answer to a
query is the value that followed its key. N = 1 is associative recall.

    one query:       BOS  . . a b V . . . c d W . . .  c d         target W at the last token
    many queries:    BOS  a b V c d W  . . . c d . a b . . . .     targets W and V, each at the last token of its key

A dot is a filler token. Keys, values and filler use separate tokens, so each N-gram of key tokens is a whole key. Each key occurs
in one pair and in at most one query, so every query has exactly one answer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from cat.config import Count
from cat.tasks.base import IGNORE, Examples, Task, draw_distinct, guess_probability

BOS = 0
_NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight")


class Recall(Task):
    """A recall task. The number of pairs grows with the length, up to the number of N-grams; then only filler grows."""

    renamed_keys: ClassVar = {**Task.renamed_keys, "questions": "queries", "gaps": "query_gap"}
    example: ClassVar = {"ngram": 3, "keys": 2, "values": 9, "filler": 1, "pairs": 2, "queries": "all", "query_gap": "uniform"}
    kind: Literal["recall"]
    ngram: Annotated[int, Field(ge=1, le=8)]
    """N: tokens per key."""
    keys: Count
    """Size of the key alphabet; keys are its N-grams. For N > 1 it must be small, or one token identifies the key."""
    values: Count
    """Size of the value alphabet."""
    filler: Count
    """Size of the filler alphabet; with 1, filler is a blank."""
    pairs: Count
    """Key-value pairs per sequence of the training length; fewer in shorter ones (`pairs_at`)."""
    queries: Literal["one", "all"]
    """`one`: a single query, at the end; `all`: one query per key."""
    query_gap: Literal["uniform", "power"]
    """Distribution of the distance g from a key to its query: uniform, or the power law g^-0.99, mostly small."""

    @model_validator(mode="after")
    def _check_pairs(self) -> Self:
        capacity = self.keys**self.ngram
        if capacity >= 2**62:
            raise ValueError(f"keys = {self.keys} has more {self.ngram}-grams than fit in a 64-bit number")
        if self.pairs > capacity:
            raise ValueError(f"pairs = {self.pairs} exceeds the {capacity} distinct {self.ngram}-grams over keys = {self.keys}")
        for length in self.generated_lengths:
            pairs = self.pairs_at(length)
            if pairs < 1:
                raise ValueError(f"length {length} is too short for a pair: {self.pairs} pairs at length {self.length} give none")
            if length < (needed := self._min_length(pairs)):
                raise ValueError(f"length {length} is too short for {pairs} pairs and their queries, which need {needed} tokens")
        return self

    @property
    def vocabulary(self) -> int:
        return 1 + self.keys + self.values + self.filler

    @property
    def label(self) -> str:
        return "associative recall" if self.ngram == 1 else f"{self.ngram}-gram recall"

    def pairs_at(self, length: int) -> int:
        """Pairs per sequence of `length` tokens: proportional to the length, at most the number of N-grams."""
        return min(self.pairs * length // self.length, self.keys**self.ngram)

    def _min_length(self, pairs: int) -> int:
        slot = self.ngram + 1
        return 1 + pairs * slot + (pairs * slot if self.queries == "all" else self.ngram)

    def examples(self, split: str, length: int, count: int, generator: np.random.Generator) -> Examples:
        """The splits differ only in their generator."""
        pairs, n, slot = self.pairs_at(length), self.ngram, self.ngram + 1
        keys = draw_distinct(generator, count, pairs, self.keys**n)
        # The N-gram with number m is m written in base `keys`.
        ngrams = keys[..., None] // self.keys ** np.arange(n - 1, -1, -1) % self.keys + 1
        values = generator.integers(0, self.values, size=(count, pairs)) + 1 + self.keys
        inputs = generator.integers(0, self.filler, size=(count, length)) + 1 + self.keys + self.values
        inputs[:, 0] = BOS
        targets = np.full((count, length), IGNORE, dtype=np.int64)

        if self.queries == "one":
            # Slots are counted backwards from the query, which is the key of pair 0.
            starts = length - n - (1 + self._draw_slots(generator, count, pairs, (length - 1 - n) // slot)) * slot
            self._write(inputs, starts, ngrams, values)
            inputs[:, -n:] = ngrams[:, 0]
            targets[:, -1] = values[:, 0]
        else:
            # The pairs start right after BOS at every length, so that longer sequences start like training sequences.
            self._write(inputs, np.broadcast_to(1 + np.arange(pairs) * slot, (count, pairs)), ngrams, values)
            starts = 1 + (pairs + self._draw_slots(generator, count, pairs, (length - 1) // slot - pairs)) * slot
            self._write(inputs, starts, ngrams, None)
            np.put_along_axis(targets, starts + n - 1, values, axis=1)
        return Examples(inputs, targets)

    def answer_positions(self, examples: Examples) -> np.ndarray:
        """At each target position, the position of the value after the first occurrence of the queried key."""
        numbers = self._key_numbers(examples)
        positions = np.full_like(numbers, -1)
        rows, targets = np.nonzero(np.asarray(examples.targets) >= 0)
        positions[rows, targets] = (numbers[rows] == numbers[rows, targets][:, None]).argmax(1) + 1
        return positions

    def oracle(self, examples: Examples) -> np.ndarray:
        """The answer to a key that occurred before is the token after its first occurrence."""
        targets = np.full(examples.inputs.shape, IGNORE, dtype=np.int64)
        for row, (tokens, numbers) in enumerate(zip(examples.inputs.tolist(), self._key_numbers(examples).tolist(), strict=True)):
            value_of: dict[int, int] = {}
            for position, number in enumerate(numbers):
                if number in value_of:
                    targets[row, position] = value_of[number]
                elif number >= 0:
                    value_of[number] = tokens[position + 1]
        return targets

    @property
    def reference_labels(self) -> dict[str, str]:
        keys = f"of {_NUMBERS[self.ngram]} key tokens"
        labels = {"guess_value": "guess a value of the context"}
        if self.ngram >= 2:
            labels["last_key_token"] = f"find one {keys}, the last"
        if self.ngram >= 3:
            labels["last_two_key_tokens"] = f"find two {keys}, the last two"
        if self.ngram >= 2:
            labels["key_token_set"] = "find the key tokens without their order"
        return labels

    def guess_value(self, examples: Examples) -> np.ndarray:
        """Guess any value of the context: the most frequent one, because it is right most often."""
        return self._guess(examples, lambda keys: keys[:, :0])

    def last_key_token(self, examples: Examples) -> np.ndarray:
        """Guess among the values whose key has the same last token as the query."""
        return self._guess(examples, lambda keys: keys[:, -1:])

    def last_two_key_tokens(self, examples: Examples) -> np.ndarray:
        """Guess among the values whose key has the same last two tokens as the query."""
        return self._guess(examples, lambda keys: keys[:, -2:])

    def key_token_set(self, examples: Examples) -> np.ndarray:
        """Guess among the values whose key has the same tokens as the query, equally often but in any order."""
        return self._guess(examples, lambda keys: np.sort(keys, axis=1))

    def _guess(self, examples: Examples, clue: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """The probability to find each answer, N x L, if only the clue of a key is known.

        `clue` maps keys, M x ngram, to their known part.
        """
        inputs, targets = (np.asarray(array, dtype=np.int64) for array in examples)
        before = np.arange(-self.ngram, 0)
        rows, ends = np.nonzero((inputs > self.keys) & (inputs <= self.keys + self.values))
        known = np.column_stack([rows, clue(inputs[rows[:, None], ends[:, None] + before])])
        query_rows, query_ends = np.nonzero(targets >= 0)
        asked = np.column_stack([query_rows, clue(inputs[query_rows[:, None], query_ends[:, None] + 1 + before])])
        found = np.zeros(inputs.shape)
        found[targets >= 0] = guess_probability(known, inputs[rows, ends], asked, targets[targets >= 0])
        return found

    def _key_numbers(self, examples: Examples) -> np.ndarray:
        """The number of the N-gram that ends at each token, N x L; -1 unless all of its tokens are key tokens, 1 .. keys."""
        tokens, n = np.asarray(examples.inputs, dtype=np.int64), self.ngram
        windows = np.lib.stride_tricks.sliding_window_view(tokens, n, axis=1)
        numbers = np.full_like(tokens, -1)
        numbers[:, n - 1 :] = ((windows - 1) * self.keys ** np.arange(n - 1, -1, -1)).sum(-1)
        numbers[:, n - 1 :][((windows < 1) | (windows > self.keys)).any(-1)] = -1
        return numbers

    def check_construction(self) -> None:
        if self.ngram > 4:
            raise ValueError(f"ngram = {self.ngram}: the construction supports at most 4, the limit of 32-bit scores")
        self._check_construction_vocabulary()

    def _draw_slots(self, generator: np.random.Generator, rows: int, count: int, slots: int) -> np.ndarray:
        """Draw `count` distinct slots per row, one after the other with probability proportional to w: sort exponentials / w."""
        weight = np.arange(1.0, slots + 1) ** (-0.99 if self.query_gap == "power" else 0.0)
        arrival = generator.standard_exponential((rows, slots)) / weight
        return np.argsort(arrival, axis=1, kind="stable")[:, :count]

    def _write(self, inputs: np.ndarray, starts: np.ndarray, ngrams: np.ndarray, values: np.ndarray | None) -> None:
        for offset in range(self.ngram):
            np.put_along_axis(inputs, starts + offset, ngrams[..., offset], axis=1)
        if values is not None:
            np.put_along_axis(inputs, starts + self.ngram, values, axis=1)
