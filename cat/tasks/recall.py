"""Associative recall and N-gram recall with one query or many (arXiv 2407.05591, section 3; MQAR: arXiv 2312.04927).

A sequence has key-value pairs, then queries, which are keys again. Each key is an N-gram over one small alphabet. The answer to a
query is the value that followed its key. N = 1 is associative recall.

    one query:       BOS  . . a b V . . . c d W . . .  c d         target W at the last token
    many queries:    BOS  a b V c d W  . . . c d . a b . . . .     targets W and V, each at the last token of its key

A dot is a filler token. Keys, values and filler use separate tokens, so each N-gram of key tokens is a whole key. Each key occurs
in one pair and in at most one query, so every query has exactly one answer.

Longer tests have proportionally more pairs, so that they are as full as training sequences, if the key alphabet has enough
N-grams. For N > 1 such an alphabet is large, so one token almost identifies a key of a short sequence. `key_subset` prevents it.

MQAR as in Zoology, at its densest, is `bos: false`, `filler: any`, `distinct_values: true` and `query_gap: power`. Zoology also
allows keys of the sequence as filler; here they are not, so that each query has one answer.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Annotated, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from cat.config import ConstructionPlacement, Count
from cat.tasks.base import IGNORE, Examples, Task, draw_distinct, guess_probability
from cat.tasks.ngrams import occurs_earlier

BOS = 0
CONSTRUCTIONS: dict[str, int] = {"qk": 4, "k": 1, "kv": 1, "token_shift": 1, "input": 3, "qkv": 3, "logits": 5}
"""Placement of a construction -> its largest N. `qk` is that of theorem 1."""
_NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight")


class Recall(Task):
    """A recall task. The number of pairs grows with the length, up to the number of N-grams; then only filler grows."""

    renamed_keys: ClassVar = {**Task.renamed_keys, "questions": "queries", "gaps": "query_gap"}
    example: ClassVar = {"ngram": 3, "keys": 2, "values": 9, "filler": 1, "pairs": 2, "queries": "all", "query_gap": "uniform"}
    kind: Literal["recall"]
    ngram: Annotated[int, Field(ge=1, le=8)]
    """N: tokens per key."""
    keys: Count
    """Size of the key alphabet; keys are its N-grams. For N > 1, one token identifies a key if it is large (see `key_subset`)."""
    values: Count
    """Size of the value alphabet."""
    filler: Count | Literal["any"]
    """Size of the filler alphabet; with 1, filler is a blank. `any`: values, and key tokens that the sequence has only there."""
    pairs: Count
    """Key-value pairs per sequence of the training length; fewer in shorter ones (`pairs_at`)."""
    queries: Literal["one", "all"]
    """`one`: a single query, at the end; `all`: one query per key."""
    query_gap: Literal["uniform", "power"]
    """Distribution of the distance g from a key to its query: uniform, or the power law g^-0.99, mostly small."""
    bos: bool = True
    """Whether sequences begin with BOS; without it, pairs and queries can fill them completely."""
    distinct_values: bool = False
    """Whether the values of a sequence all differ."""
    key_subset: bool = False
    """Whether the keys of each sequence use a random subset of the key tokens, the smallest with enough N-grams.

    Then one token does not identify a key, although the key alphabet is large enough for long sequences.
    """
    both_orders: bool = False
    """Whether each key also occurs in reverse, with another value, so that its tokens without their order do not identify it."""
    padded: bool = False
    """Whether the task is a control in which longer tests have the same pairs and more filler."""

    @model_validator(mode="after")
    def _check_forms(self) -> Self:
        for key in ("key_subset", "both_orders"):
            if getattr(self, key) and self.ngram == 1:
                raise ValueError(f"{key} = true needs keys of several tokens, not ngram = 1")
        if self.filler == "any" and self.ngram > 1:
            raise ValueError(f"filler = any needs ngram = 1: with ngram = {self.ngram}, filler would form keys")
        if self.both_orders and (self.pairs % 2 or self.values == 1):
            problem = "values = 1 must be at least 2" if self.values == 1 else f"pairs = {self.pairs} must be even"
            raise ValueError(f"{problem}, because both_orders = true")
        if self.distinct_values and (pairs := self.pairs_at(self.lengths[-1])) > self.values:
            raise ValueError(
                f"values = {self.values} are fewer than the {pairs} pairs of length {self.lengths[-1]}, which must differ"
            )
        if self.padded and not self._padded_lengths:
            raise ValueError("padded = true, but every test length has enough keys for as many pairs as training sequences have")
        return self

    @model_validator(mode="after")
    def _check_pairs(self) -> Self:
        if self.keys**self.ngram >= 2**62:
            raise ValueError(f"keys = {self.keys} has more {self.ngram}-grams than fit in a 64-bit number")
        if self.pairs > (capacity := self._capacity(self.keys)):
            kind = f"{self.ngram}-grams" + (" with another reverse" if self.both_orders else "")
            raise ValueError(f"pairs = {self.pairs} exceeds the {capacity} distinct {kind} over keys = {self.keys}")
        for length in self.generated_lengths:
            pairs = self.pairs_at(length)
            if pairs < 1:
                raise ValueError(f"length {length} is too short for a pair: {self.pairs} pairs at length {self.length} give none")
            if length < (needed := self._min_length(pairs)):
                raise ValueError(f"length {length} is too short for {pairs} pairs and their queries, which need {needed} tokens")
        return self

    @property
    def vocabulary(self) -> int:
        return 1 + self.keys + self.values + (0 if self.filler == "any" else self.filler)

    @property
    def label(self) -> str:
        name = "associative recall" if self.ngram == 1 else f"{self.ngram}-gram recall"
        return f"{name}, padded" if self.padded else name

    def pairs_at(self, length: int) -> int:
        """Pairs per sequence of `length` tokens: proportional to the length, at most the number of N-grams."""
        return min(self._proportional_pairs(length), self._capacity(self.keys))

    def notes(self) -> list[str]:
        if self.padded or not (lengths := self._padded_lengths):
            return []
        longest, pairs = lengths[-1], self.pairs_at(lengths[-1])
        filler = 1 - self._min_length(pairs) / longest
        keys = next(k for k in itertools.count(self.keys) if self._capacity(k) >= self._proportional_pairs(longest))
        subset = " with key_subset: true" if self.ngram > 1 and not self.key_subset else ""
        return [
            f"tests of {lengths[0]} tokens and more have only {pairs} pairs, as many as there are keys; {filler:.0%} of {longest}"
            f" tokens is filler. Fix: keys = {keys}{subset}, or padded: true for a control"
        ]

    @property
    def _padded_lengths(self) -> list[int]:
        """The test lengths that have fewer pairs than in proportion."""
        return [length for length in self.lengths if self.pairs_at(length) < self._proportional_pairs(length)]

    def _proportional_pairs(self, length: int) -> int:
        """Pairs at the density of training sequences; an even number if each key also occurs in reverse."""
        pairs = self.pairs * length // self.length
        return pairs - pairs % 2 if self.both_orders else pairs

    def _capacity(self, tokens: int) -> int:
        """The number of keys over an alphabet; with both orders, without those that read the same in reverse."""
        palindromes = tokens ** -(-self.ngram // 2) if self.both_orders else 0
        return tokens**self.ngram - palindromes

    @property
    def _first(self) -> int:
        """The position after BOS."""
        return int(self.bos)

    def _min_length(self, pairs: int) -> int:
        slot = self.ngram + 1
        return self._first + pairs * slot + (pairs * slot if self.queries == "all" else self.ngram)

    def examples(self, split: str, length: int, count: int, generator: np.random.Generator) -> Examples:
        """The splits differ only in their generator."""
        pairs, n, slot, first = self.pairs_at(length), self.ngram, self.ngram + 1, self._first
        ngrams, values = self._draw_pairs(generator, count, pairs)
        inputs = self._draw_filler(generator, ngrams[..., 0], length)
        inputs[:, :first] = BOS
        targets = np.full((count, length), IGNORE, dtype=np.int64)

        if self.queries == "one":
            # Slots are counted backwards from the query, which is the key of pair 0.
            starts = length - n - (1 + self._draw_slots(generator, count, pairs, (length - first - n) // slot)) * slot
            self._write(inputs, starts, ngrams, values)
            inputs[:, -n:] = ngrams[:, 0]
            targets[:, -1] = values[:, 0]
        else:
            # The pairs come first at every length, so that longer sequences start like training sequences.
            self._write(inputs, np.broadcast_to(first + np.arange(pairs) * slot, (count, pairs)), ngrams, values)
            starts = first + (pairs + self._draw_slots(generator, count, pairs, (length - first) // slot - pairs)) * slot
            self._write(inputs, starts, ngrams, None)
            np.put_along_axis(targets, starts + n - 1, values, axis=1)
        return Examples(inputs, targets)

    def _draw_pairs(self, generator: np.random.Generator, rows: int, pairs: int) -> tuple[np.ndarray, np.ndarray]:
        """Draw different keys, rows x pairs x N, and their values, rows x pairs."""
        letters = self.keys
        if self.key_subset:
            letters = next(k for k in range(1, self.keys + 1) if self._capacity(k) >= pairs)
        if self.both_orders:
            ngrams = self._draw_both_orders(generator, rows, pairs, letters)
        else:
            ngrams = _digits(draw_distinct(generator, rows, pairs, letters**self.ngram), letters, self.ngram)
        if self.key_subset:
            ngrams = draw_distinct(generator, rows, letters, self.keys)[np.arange(rows)[:, None, None], ngrams]
        if self.distinct_values:
            values = draw_distinct(generator, rows, pairs, self.values)
        else:
            values = generator.integers(0, self.values, size=(rows, pairs))
        if self.both_orders:
            if not self.distinct_values:  # the second half are the reverses of the first
                half = pairs // 2
                values[:, half:] = (values[:, :half] + generator.integers(1, self.values, size=(rows, half))) % self.values
            order = generator.permuted(np.broadcast_to(np.arange(pairs), (rows, pairs)), axis=1)
            ngrams, values = np.take_along_axis(ngrams, order[..., None], axis=1), np.take_along_axis(values, order, axis=1)
        return ngrams + 1, values + 1 + self.keys

    def _draw_both_orders(self, generator: np.random.Generator, rows: int, pairs: int, letters: int) -> np.ndarray:
        """Draw N-grams, then the reverse of each, rows x pairs x N.

        An N-gram is u, for odd N a middle letter, and the reverse of w. Its reverse has u and w exchanged: another one if u != w.
        """
        side, middle = self.ngram // 2, self.ngram % 2
        halves, middles = letters**side, letters**middle
        number, center = np.divmod(draw_distinct(generator, rows, pairs // 2, halves * (halves - 1) // 2 * middles), middles)
        u, w = (_digits(half, letters, side) for half in _different_pair(number))
        forward = np.concatenate([u, _digits(center, letters, middle), w[..., ::-1]], axis=-1)
        return np.concatenate([forward, forward[..., ::-1]], axis=1)

    def _draw_filler(self, generator: np.random.Generator, keys: np.ndarray, length: int) -> np.ndarray:
        """Draw sequences of filler only; `keys`, rows x pairs, are the keys of the sequence if N = 1."""
        shape = len(keys), length
        if self.filler != "any":
            return generator.integers(0, self.filler, size=shape) + 1 + self.keys + self.values
        drawn = generator.integers(1, self.vocabulary, size=shape)
        repeated = occurs_earlier(np.concatenate([keys, drawn], axis=1))[:, keys.shape[1] :]
        return np.where(repeated & (drawn <= self.keys), generator.integers(1 + self.keys, self.vocabulary, size=shape), drawn)

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
            for position, (number, following) in enumerate(zip(numbers, [*tokens[1:], IGNORE], strict=True)):
                if number in value_of:
                    targets[row, position] = value_of[number]
                elif number >= 0:
                    value_of[number] = following
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
        rows, ends = np.nonzero(self._is_paired_value(inputs))
        known = np.column_stack([rows, clue(inputs[rows[:, None], ends[:, None] + before])])
        query_rows, query_ends = np.nonzero(targets >= 0)
        asked = np.column_stack([query_rows, clue(inputs[query_rows[:, None], query_ends[:, None] + 1 + before])])
        found = np.zeros(inputs.shape)
        found[targets >= 0] = guess_probability(known, inputs[rows, ends], asked, targets[targets >= 0])
        return found

    def _is_paired_value(self, inputs: np.ndarray) -> np.ndarray:
        """Whether each token is the value of a pair, N x L. Filler that looks like a pair before the first query counts."""
        is_value = (inputs > self.keys) & (inputs <= self.keys + self.values)
        if self.filler == "any":
            is_key = (inputs > BOS) & (inputs <= self.keys)
            is_value[:, 1:] &= is_key[:, :-1]
            if self.queries == "all":
                is_value[:, self._first + 2 * self.pairs_at(inputs.shape[1]) :] = False
        return is_value

    def _key_numbers(self, examples: Examples) -> np.ndarray:
        """The number of the N-gram that ends at each token, N x L; -1 unless all of its tokens are key tokens, 1 .. keys."""
        tokens, n = np.asarray(examples.inputs, dtype=np.int64), self.ngram
        windows = np.lib.stride_tricks.sliding_window_view(tokens, n, axis=1)
        numbers = np.full_like(tokens, -1)
        numbers[:, n - 1 :] = ((windows - 1) * self.keys ** np.arange(n - 1, -1, -1)).sum(-1)
        numbers[:, n - 1 :][((windows < 1) | (windows > self.keys)).any(-1)] = -1
        return numbers

    def check_construction(self, placement: ConstructionPlacement | None = None) -> None:
        placement = placement or "qk"
        if placement not in CONSTRUCTIONS:
            raise ValueError(f"no construction with placement = {placement} solves recall")
        if self.ngram > (most := CONSTRUCTIONS[placement]):
            where = "" if placement == "qk" else f" with placement = {placement}"
            why = ", the limit of 32-bit scores" if placement == "qk" else ""
            raise ValueError(f"ngram = {self.ngram}: the construction{where} supports at most {most}{why}")
        if not self.bos:
            raise ValueError("the construction for recall needs bos = true")
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


def _digits(numbers: np.ndarray, base: int, count: int) -> np.ndarray:
    """The last `count` digits of each number, highest first."""
    return numbers[..., None] // base ** np.arange(count - 1, -1, -1) % base


def _different_pair(number: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The pairs u < w of these numbers in the order (0, 1), (0, 2), (1, 2), (0, 3), ..."""
    w = ((1 + np.sqrt(1 + 8.0 * number)) / 2).astype(np.int64)
    w -= w * (w - 1) // 2 > number  # the root of a large number is rounded up
    return number - w * (w - 1) // 2, w
