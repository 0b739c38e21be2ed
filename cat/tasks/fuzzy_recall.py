"""Fuzzy in-context recall: keys and values of one to three tokens, mixed in one sequence (MAD, arXiv 2403.17844).

A sequence has each key with its value once, then all keys again in another order, each with its value.

    BOS  a X Y  b a X  a c Y Z Z    b a X  a c Y Z Z  a X        targets X at `b a`; Y, Z, Z from `a c` on; X, then Y at `a`

Keys and values use separate tokens, so a key is a run of key tokens. The targets are the tokens of the asked values, with teacher
forcing: each token of a value is an input before the next is asked. Sequences are full. The last query may be cut within its
value; if it would be cut within its key, BOS stands for this part of the key.

The keys of one sequence use the smallest random subset of the key tokens that gives enough keys of each size. So every token ends
several keys at every length. With many more tokens than keys, the last token alone would identify a key.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Annotated, ClassVar, Literal, NamedTuple, Self

import numpy as np
from pydantic import Field, model_validator

from cat.config import Count
from cat.tasks.base import IGNORE, Examples, Task, draw_distinct, guess_probability

BOS = 0
Size = Annotated[int, Field(ge=1, le=8)]


class Entries(NamedTuple):
    """M keys with their values, each in one row."""

    rows: np.ndarray
    """The sequence of each entry, M."""
    starts: np.ndarray
    """The position of the first token of the value, M."""
    keys: np.ndarray
    """M x key_size; the last column is the last token, and 0 stands before a shorter key."""
    values: np.ndarray
    """M x value_size; 0 stands after a shorter value."""


class FuzzyRecall(Task):
    """Fuzzy recall. The number of pairs grows with the length, so that sequences stay full."""

    example: ClassVar = {"keys": 5, "values": 3, "key_size": 3, "value_size": 2}
    kind: Literal["fuzzy_recall"]
    keys: Count
    """Number of distinct key tokens."""
    values: Count
    """Number of distinct value tokens."""
    key_size: Size
    """Most tokens of a key; all sizes from 1 on are equally frequent."""
    value_size: Size
    """Most tokens of a value; all sizes from 1 on are equally frequent."""

    @model_validator(mode="after")
    def _check_keys(self) -> Self:
        for length in self.generated_lengths:
            pairs = self.pairs_at(length)
            if (needed := self._min_length(pairs)) > length:
                raise ValueError(f"length {length} is too short for {pairs} pairs and a query, which need {needed} tokens")
            if (letters := self._subset(pairs)) > self.keys:
                raise ValueError(
                    f"length {length} has {pairs} pairs, which need {letters} key tokens, more than keys = {self.keys}"
                )
        return self

    @property
    def vocabulary(self) -> int:
        return 1 + self.keys + self.values

    @property
    def label(self) -> str:
        return "fuzzy recall"

    def _min_length(self, pairs: int) -> int:
        """Tokens up to the end of the longest key that may be asked first."""
        sizes = self._sizes(pairs)
        return 1 + int(sizes.sum() + sizes[:, 0].max())

    def _sizes(self, pairs: int) -> np.ndarray:
        """Tokens of the key and of the value of each pair, pairs x 2: all combinations in turn."""
        combinations = itertools.product(range(1, self.value_size + 1), range(1, self.key_size + 1))
        sizes = np.array([(key, value) for value, key in combinations])
        return sizes[np.arange(pairs) % len(sizes)]

    def pairs_at(self, length: int) -> int:
        """Pairs in sequences of `length` tokens: the fewest that, with their queries, fill it."""
        tokens = 1 + 2 * self._sizes(length).sum(axis=1).cumsum()
        return int(np.searchsorted(tokens, length)) + 1

    def _subset(self, pairs: int) -> int:
        """The number of key tokens in a sequence: that of keys of one token, because longer keys are no more frequent."""
        return int((self._sizes(pairs)[:, 0] == 1).sum())

    def examples(self, split: str, length: int, count: int, generator: np.random.Generator) -> Examples:
        """The splits differ only in their generator."""
        pairs = self.pairs_at(length)
        sizes = self._sizes(pairs)
        keys = self._draw_keys(generator, count, sizes[:, 0])
        values = generator.integers(1 + self.keys, self.vocabulary, size=(count, pairs, self.value_size))
        values[:, np.arange(self.value_size) >= sizes[:, 1:]] = BOS
        # BOS stands for no token. Rows have equally many others, so that removing it leaves a matrix.
        entries = np.concatenate([keys, values], axis=2)
        context, asked = (entries[np.arange(count)[:, None], self._order(generator, count, pairs)] for _ in range(2))
        # The target of a token is the next one of its entry, if that is part of the value.
        answers = np.full(asked.shape, IGNORE)
        answers[:, :, self.key_size - 1 : -1] = np.where(asked[:, :, self.key_size :] > BOS, asked[:, :, self.key_size :], IGNORE)
        inputs, targets = np.full((count, length), BOS), np.full((count, length), IGNORE)
        shown = context[context > BOS].reshape(count, -1)
        rest = length - 1 - shown.shape[1]
        inputs[:, 1:-rest] = shown
        inputs[:, -rest:] = asked[asked > BOS].reshape(count, -1)[:, :rest]
        targets[:, -rest:] = answers[asked > BOS].reshape(count, -1)[:, :rest]
        # A part of a key may be another key.
        is_cut = np.logical_and.accumulate((inputs <= self.keys)[:, ::-1], axis=1)[:, ::-1] & (targets[:, -1:] == IGNORE)
        inputs[is_cut] = BOS
        return Examples(inputs, targets)

    def _draw_keys(self, generator: np.random.Generator, rows: int, sizes: np.ndarray) -> np.ndarray:
        """Draw keys of the given sizes, rows x pairs x key_size; BOS stands before shorter keys."""
        letters = self._subset(len(sizes))
        subset = draw_distinct(generator, rows, letters, self.keys) + 1
        keys = np.full((rows, len(sizes), self.key_size), BOS)
        for size in range(1, self.key_size + 1):
            (places,) = np.nonzero(sizes == size)
            numbers = draw_distinct(generator, rows, len(places), letters**size)
            digits = numbers[:, :, None] // letters ** np.arange(size - 1, -1, -1) % letters
            keys[:, places, self.key_size - size :] = subset[np.arange(rows)[:, None, None], digits]
        return keys

    def _order(self, generator: np.random.Generator, rows: int, pairs: int) -> np.ndarray:
        return generator.permuted(np.broadcast_to(np.arange(pairs), (rows, pairs)), axis=1)

    def answer_positions(self, examples: Examples) -> np.ndarray:
        """At each target position, the position of the token in the value of the context."""
        context, asked = self._context(examples), self._asked(examples)
        start_of = {
            (row, *key): start for row, start, key in zip(context.rows, context.starts, map(tuple, context.keys), strict=True)
        }
        positions = np.full(examples.inputs.shape, -1)
        for row, start, key, value in zip(asked.rows, asked.starts, map(tuple, asked.keys), asked.values, strict=True):
            steps = np.arange(np.count_nonzero(value))
            positions[row, start - 1 + steps] = start_of[row, *key] + steps
        return positions

    def oracle(self, examples: Examples) -> np.ndarray:
        """The value of a key that occurred before, token by token."""
        targets = np.full(examples.inputs.shape, IGNORE, dtype=np.int64)
        for row, tokens in enumerate(np.asarray(examples.inputs).tolist()):
            values: dict[tuple[int, ...], list[int]] = {}
            is_value, position = [token > self.keys for token in tokens], 1
            while position < len(tokens):
                start = next((t for t in range(position, len(tokens)) if is_value[t]), len(tokens))
                end = next((t for t in range(start, len(tokens)) if not is_value[t]), len(tokens))
                key = tuple(tokens[position:start])
                if key in values:
                    answer = values[key][: len(tokens) - start + 1]
                    targets[row, start - 1 : start - 1 + len(answer)] = answer
                values.setdefault(key, tokens[start:end])
                position = end
        return targets

    @property
    def reference_labels(self) -> dict[str, str]:
        labels = {"any_value": "guess a value of the context, each token after right ones"}
        if self.key_size >= 2:
            labels["last_key_token"] = "find the last key token, then guess a value"
        if self.key_size >= 3:
            labels["last_two_key_tokens"] = "find the last two key tokens, then guess a value"
        return labels

    def any_value(self, examples: Examples) -> np.ndarray:
        """Guess among all values of the context that begin with the tokens so far."""
        return self._guess(examples, lambda keys: keys[:, :0])

    def last_key_token(self, examples: Examples) -> np.ndarray:
        """Guess among the values that begin with the tokens so far and whose key has the same last token."""
        return self._guess(examples, lambda keys: keys[:, -1:])

    def last_two_key_tokens(self, examples: Examples) -> np.ndarray:
        """The same for the last two tokens of the key; a key of one token differs from all longer ones."""
        return self._guess(examples, lambda keys: keys[:, -2:])

    def _guess(self, examples: Examples, clue: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """The probability to find each answer, N x L, if the clue of a key and the value so far are known.

        `clue` maps keys, M x key_size, to their known part.
        """
        context, asked = self._context(examples), self._asked(examples)
        found = np.zeros(examples.inputs.shape)
        for step in range(self.value_size):
            candidates, questions = context.values[:, step] > BOS, asked.values[:, step] > BOS
            if questions.any():
                known, wanted = (
                    np.column_stack([entries.rows, clue(entries.keys), entries.values[:, :step]])[chosen]
                    for entries, chosen in ((context, candidates), (asked, questions))
                )
                answers = asked.values[questions, step]
                probability = guess_probability(known, context.values[candidates, step], wanted, answers)
                found[asked.rows[questions], asked.starts[questions] - 1 + step] = probability
        return found

    def _context(self, examples: Examples) -> Entries:
        """The pairs of the context."""
        inputs = np.asarray(examples.inputs, dtype=np.int64)
        shown = inputs[:, : 1 + int(self._sizes(self.pairs_at(inputs.shape[1])).sum())]
        is_value = shown > self.keys
        rows, starts = np.nonzero(is_value[:, 1:] & ~is_value[:, :-1])
        return self._entries(shown, np.where(is_value, shown, BOS), rows, starts + 1)

    def _asked(self, examples: Examples) -> Entries:
        """The queries, with the tokens of their values that are targets."""
        inputs, targets = (np.asarray(array, dtype=np.int64) for array in examples)
        rows, ends = np.nonzero((targets >= 0) & (inputs <= self.keys))
        following = np.column_stack(
            [np.full(len(inputs), BOS), np.maximum(targets, BOS)]
        )  # the value token that each target asks
        return self._entries(inputs, following, rows, ends + 1)

    def _entries(self, inputs: np.ndarray, values: np.ndarray, rows: np.ndarray, starts: np.ndarray) -> Entries:
        """The entries with values from `starts` on: the key tokens before in `inputs`, and the value tokens in `values`."""
        before = np.pad(inputs, [(0, 0), (self.key_size, 0)])[rows[:, None], starts[:, None] + np.arange(self.key_size)]
        run = np.logical_and.accumulate(((before > BOS) & (before <= self.keys))[:, ::-1], axis=1)[:, ::-1]
        after = np.pad(values, [(0, 0), (0, self.value_size)])[rows[:, None], starts[:, None] + np.arange(self.value_size)]
        return Entries(
            rows, starts, np.where(run, before, BOS), np.where(np.logical_and.accumulate(after > BOS, axis=1), after, BOS)
        )
