"""Needles in real text: retrieval and question answering by proxy.

Marked facts stand at random depths of a text. Queries at the end ask for some of them.

    t h e MARK a n V _ m a n y _ o t h e r MARK e r W _ . . .  ASK e r  ASK a n      targets W and V, each at the end of a query

A needle is MARK, a key and its value. MARK and ASK are two tokens that the text does not have. The key is an N-gram that the text
also contains without MARK, so finding the key is not enough. The value is one of the most frequent tokens of the text.

Every query has exactly one answer: the keys of a sequence are distinct, and no value stands next to its key elsewhere.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Annotated, ClassVar, Literal, NamedTuple, Self

import numpy as np
from pydantic import Field, model_validator

from cat.config import Count
from cat.tasks.base import IGNORE, Examples, guess_probability
from cat.tasks.encoded import EncodedText, tokenizer_of, tokens_of, tokens_of_source
from cat.tasks.ngrams import check_packing, occurs_earlier, occurs_elsewhere, pack

CHUNK_TOKENS = 1 << 20
"""Tokens of the sequences that are drawn at a time, to bound memory. The examples depend on it."""

ATTEMPTS = 100
"""How often a sequence is drawn before its text counts as too repetitive."""

REPAIRS = 10
"""How often values that stand beside their key are drawn anew before the sequence is."""


class Facts(NamedTuple):
    """The needles and queries of N sequences, in order of position."""

    keys: np.ndarray
    """N x needles x ngram."""
    value_positions: np.ndarray
    """N x needles."""
    values: np.ndarray
    """N x needles."""
    queries: np.ndarray
    """N x queries x ngram."""
    query_positions: np.ndarray
    """N x queries: the last token of each query."""


class Needles(EncodedText):
    """Marked facts in a text. Each split takes its text from its own part of the source."""

    example: ClassVar = {"source": "python-docs", "needles": 2, "queries": 2, "ngram": 2, "values": 16}
    kind: Literal["needles"]
    test_source: Annotated[str, Field(min_length=1)] | None = None
    """The source whose test split the test sequences come from, with the tokenizer of `source`; None: `source`."""
    needles: Count
    """Needles in a sequence of the training length."""
    scale_needles: bool = False
    """Whether the number of needles is proportional to the length; otherwise it is the same at every length."""
    queries: Count
    """Needles that are asked for, each once."""
    ngram: Annotated[int, Field(ge=1, le=8)]
    """N: tokens per key."""
    shared_endings: bool = False
    """Whether keys have last tokens in common, if the text has such N-grams; otherwise the last token often identifies a key."""
    values: Count
    """Number of different values: the most frequent tokens of the training split."""
    test_depth: Annotated[float, Field(ge=0, le=100)] | None = None
    """Where the asked needles of test sequences stand, in percent of the text; None: anywhere, as in training."""

    @model_validator(mode="after")
    def _check_needles(self) -> Self:
        if (largest := 256 if self.tokens == "bytes" else self.vocabulary_size) is not None:
            check_packing(largest + 2, self.ngram + 1)
        if self.shared_endings and self.ngram == 1:
            raise ValueError("shared_endings = true needs ngram = 2 or more, but ngram = 1")
        for length in self.generated_lengths:
            needles = self.needles_at(length)
            if needles < self.queries:
                raise ValueError(f"length {length} has {needles} needles, fewer than queries = {self.queries}")
            if (room := self.text_at(length)) < (needed := needles * self.ngram):
                raise ValueError(
                    f"length {length} is too short for {needles} needles and {self.queries} queries,"
                    f" which need {length - room + needed} tokens"
                )
        return self

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.source,) if self.test_source is None else (self.source, self.test_source)

    @property
    def mark(self) -> int:
        """The token before the key of a needle."""
        return tokenizer_of(self).size

    @property
    def ask(self) -> int:
        """The token before the key of a query."""
        return self.mark + 1

    @property
    def vocabulary(self) -> int:
        """Vocabulary size. Unless tokens are bytes, this reads the training split; raises ValueError if it cannot be read."""
        return self.mark + 2

    @property
    def label(self) -> str:
        return "needles in text"

    def needles_at(self, length: int) -> int:
        """Needles in a sequence of `length` tokens."""
        return self.needles * length // self.length if self.scale_needles else self.needles

    def text_at(self, length: int) -> int:
        """Tokens of text in a sequence of `length` tokens."""
        return length - self.needles_at(length) * (self.ngram + 2) - self.queries * (self.ngram + 1)

    def examples(self, split: str, length: int, count: int, generator: np.random.Generator) -> Examples:
        """Raises ValueError if the source has too little text, too few different tokens, or too many repetitions."""
        check_packing(self.vocabulary, self.ngram + 1)
        source = self.test_source if split == "test" and self.test_source is not None else self.source
        text, room = tokens_of_source(self, source, split), self.text_at(length)
        if len(text) < room:
            raise ValueError(
                f"the {split} split of {source} has {len(text)} tokens, too few for the {room} of a sequence of length {length}"
            )
        windows = np.lib.stride_tricks.sliding_window_view(text, room)
        depth = self.test_depth if split == "test" else None
        examples, pending = Examples(*np.empty((2, count, length), dtype=np.int64)), np.arange(count)
        for _ in range(ATTEMPTS):
            again = []
            for rows in np.array_split(pending, min(len(pending), -(-len(pending) * length // CHUNK_TOKENS))):
                drawn, is_valid = self._draw(windows, length, len(rows), depth, generator)
                examples.inputs[rows], examples.targets[rows] = drawn
                again.append(rows[~is_valid])
            pending = np.concatenate(again)
            if not len(pending):
                return examples
        raise ValueError(
            f"the {split} split of {source} is too repetitive for {self.needles_at(length)} needles with {self.values} values"
            f" in sequences of length {length}. Fix: fewer needles, more values, or another text"
        )

    def _draw(
        self, windows: np.ndarray, length: int, count: int, depth: float | None, generator: np.random.Generator
    ) -> tuple[Examples, np.ndarray]:
        """Draw `count` sequences; returns them, and which of them have distinct keys and admissible values."""
        n, needles, rows = self.ngram, self.needles_at(length), np.arange(count)[:, None]
        text = windows[generator.integers(0, len(windows), size=count)].astype(np.uint32)
        starts, is_valid = self._draw_keys(text, needles, generator)
        gaps = self._draw_gaps(text, starts, depth, generator)
        marks = gaps + (n + 2) * gaps.argsort(axis=1).argsort(axis=1)  # needles before a needle shift it

        inputs = np.empty((count, length), dtype=np.uint32)
        is_text = np.ones((count, length), dtype=bool)
        is_text[:, text.shape[1] + needles * (n + 2) :] = False
        for offset in range(n + 2):
            is_text[rows, marks + offset] = False
            inputs[rows, marks + offset] = text[rows, starts + offset - 1] if 0 < offset <= n else self.mark
        inputs[is_text] = text.ravel()
        asked = np.full((count, self.queries, n + 1), self.ask)
        asked[:, :, 1:] = text[rows[..., None], starts[:, : self.queries, None] + np.arange(n)]
        inputs[:, -self.queries * (n + 1) :] = asked.reshape(count, -1)

        is_valid &= self._draw_values(inputs, marks, generator)
        targets = np.full((count, length), IGNORE, dtype=np.int64)
        targets[:, length - (n + 1) * np.arange(self.queries, 0, -1) + n] = inputs[rows, marks + n + 1][:, : self.queries]
        return Examples(inputs, targets), is_valid

    def _draw_keys(self, text: np.ndarray, needles: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """The start of one occurrence of each key, N x needles, and whether the keys of each text are distinct."""
        packed = pack(text, self.ngram, self.vocabulary)
        order = generator.permuted(np.broadcast_to(np.arange(packed.shape[1]), packed.shape), axis=1)
        is_repeated = occurs_earlier(np.take_along_axis(packed, order, axis=1))
        rank = np.full(order.shape, 2 * order.size)
        rank[~is_repeated] = np.arange(np.count_nonzero(~is_repeated))
        if self.shared_endings:
            rank[~is_repeated] = _group(np.take_along_axis(text, order + self.ngram - 1, axis=1), ~is_repeated)
        first = rank.argsort(axis=1, kind="stable")[:, :needles]
        return np.take_along_axis(order, first, axis=1), (~is_repeated).sum(axis=1) >= needles

    def _draw_gaps(self, text: np.ndarray, starts: np.ndarray, depth: float | None, generator: np.random.Generator) -> np.ndarray:
        """The token of the text that each needle precedes, N x needles.

        No needle cuts the occurrence of a key in two or, as far as possible, stands right before an occurrence of its own key.
        With a depth, the first `queries` needles are as close to it as possible.
        """
        size, end = text.shape[1], np.full((len(text), self.ngram), self.mark, dtype=text.dtype)
        packed = pack(np.concatenate([text, end], axis=1), self.ngram, self.vocabulary)
        gaps, again = np.empty_like(starts), np.arange(len(starts))
        for _ in range(REPAIRS):
            rows = np.arange(len(again))[:, None]
            arrival = generator.random((len(again), size + 1))
            for offset in range(1, self.ngram):
                arrival[rows, starts[again] + offset] = np.inf
            if depth is not None:
                distance = np.where(np.isinf(arrival), np.inf, np.abs(np.arange(size + 1) - depth / 100 * size))
                nearest = distance.argsort(axis=1, kind="stable")[:, : self.queries]
                arrival[rows, nearest] = -1 + np.arange(self.queries) / self.queries
            gaps[again] = arrival.argsort(axis=1, kind="stable")[:, : starts.shape[1]]
            rows = again[:, None]
            again = again[(packed[rows, gaps[again]] == packed[rows, starts[again]]).any(axis=1)]
        return gaps

    def _draw_values(self, inputs: np.ndarray, marks: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Write the value of each needle; returns which sequences have no value next to its key elsewhere."""
        tokens, positions = np.append(_values(self), self.mark), marks + self.ngram + 1
        chosen, wrong = np.full(marks.shape, self.values), np.arange(len(marks))
        inputs[wrong[:, None], positions] = self.mark
        for _ in range(REPAIRS):
            is_allowed = ~self._stands_beside(inputs[wrong], marks[wrong])
            redraw = ~np.take_along_axis(is_allowed, chosen[wrong][..., None], axis=2)[..., 0]
            is_wrong = redraw.any(axis=1)
            wrong, is_allowed, redraw = wrong[is_wrong], is_allowed[is_wrong], redraw[is_wrong]
            if not len(wrong):
                break
            nth = (generator.random(redraw.shape) * is_allowed.sum(axis=2)).astype(np.int64)
            drawn = (is_allowed.cumsum(axis=2, dtype=np.int32) > nth[..., None]).argmax(axis=2)
            chosen[wrong] = np.where(redraw, drawn, chosen[wrong])
            inputs[wrong[:, None], positions[wrong]] = tokens[chosen[wrong]]
        return np.isin(np.arange(len(marks)), wrong, invert=True)

    def _stands_beside(self, inputs: np.ndarray, marks: np.ndarray) -> np.ndarray:
        """Whether each value stands next to an unmarked occurrence of each key, N x needles x (values + 1).

        The last column, for no value, is true.
        """
        index = np.full(self.vocabulary, self.values)
        index[_values(self)] = np.arange(self.values)
        index = index[np.pad(inputs, ((0, 0), (1, 1)), constant_values=self.mark)]  # of the value at each token, from -1 on
        row, position, needle = occurs_elsewhere(pack(inputs, self.ngram, self.vocabulary), marks + 1)
        beside = np.zeros((*marks.shape, self.values + 1), dtype=bool)
        beside[row, needle, index[row, position]] = True
        beside[row, needle, index[row, position + self.ngram + 1]] = True
        beside[..., -1] = True
        return beside

    def facts(self, examples: Examples) -> Facts:
        """Find the needles and queries of N sequences."""
        inputs = np.asarray(examples.inputs, dtype=np.int64)
        rows, n = np.arange(len(inputs))[:, None], self.ngram
        marks, asks = (np.nonzero(inputs == token)[1].reshape(len(inputs), -1) for token in (self.mark, self.ask))
        keys, queries = (inputs[rows[..., None], at[..., None] + 1 + np.arange(n)] for at in (marks, asks))
        return Facts(keys, marks + n + 1, inputs[rows, marks + n + 1], queries, asks + n)

    def answer_positions(self, examples: Examples) -> np.ndarray:
        """At each target position, the position of the value of the queried needle."""
        facts = self.facts(examples)
        is_asked = (facts.keys[:, None] == facts.queries[:, :, None]).all(axis=-1)
        positions = np.full(np.shape(examples.targets), -1)
        found = np.take_along_axis(facts.value_positions, is_asked.argmax(axis=2), axis=1)
        np.put_along_axis(positions, facts.query_positions, found, axis=1)
        return positions

    def oracle(self, examples: Examples) -> np.ndarray:
        """The answer to a query is the token after MARK and its key."""
        n, mark, ask = self.ngram, self.mark, self.ask
        targets = np.full(examples.inputs.shape, IGNORE, dtype=np.int64)
        for row, tokens in enumerate(examples.inputs.tolist()):
            value_of = {tuple(tokens[i + 1 : i + 1 + n]): tokens[i + 1 + n] for i, token in enumerate(tokens) if token == mark}
            for position, token in enumerate(tokens):
                if token == ask:
                    targets[row, position + n] = value_of[tuple(tokens[position + 1 : position + 1 + n])]
        return targets

    @property
    def reference_labels(self) -> dict[str, str]:
        labels = {
            "guess_value": "guess a value of the context",
            "last_value": "take the value of the last needle",
            "any_occurrence": "find the key without the marker",
        }
        if self.ngram > 1:
            labels["last_key_token"] = "find the last key token of a needle"
        return labels

    def guess_value(self, examples: Examples) -> np.ndarray:
        """Guess any value of the context: the most frequent one, because it is right most often."""
        return self._guess(examples, lambda keys: keys[:, :0])

    def last_value(self, examples: Examples) -> np.ndarray:
        """Take the value of the last needle."""
        facts = self.facts(examples)
        return (np.asarray(examples.targets) == facts.values[:, -1:]).astype(float)

    def any_occurrence(self, examples: Examples) -> np.ndarray:
        """Take the token after any occurrence of the key before the queries, marked or not."""
        facts, targets = self.facts(examples), np.asarray(examples.targets)
        inputs = np.asarray(examples.inputs)[:, : -self.queries * (self.ngram + 1)].astype(np.uint32)
        packed, found = pack(inputs, self.ngram, self.vocabulary)[:, :-1], np.zeros(targets.shape)
        rows = np.arange(len(inputs))
        for query, position in zip(facts.queries.swapaxes(0, 1), facts.query_positions.T, strict=True):
            is_key = packed == pack(query.astype(np.uint32), self.ngram, self.vocabulary)
            is_answer = is_key & (inputs[:, self.ngram :] == targets[rows, position][:, None])
            found[rows, position] = is_answer.sum(axis=1) / is_key.sum(axis=1)
        return found

    def last_key_token(self, examples: Examples) -> np.ndarray:
        """Guess among the values whose key has the same last token as the query."""
        return self._guess(examples, lambda keys: keys[:, -1:])

    def _guess(self, examples: Examples, clue: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """The probability to find each answer, N x L, if only the clue of a key is known.

        `clue` maps keys, M x ngram, to their known part.
        """
        facts, targets, n = self.facts(examples), np.asarray(examples.targets, dtype=np.int64), self.ngram
        row_of_value, row_of_query = (np.indices(array.shape)[0].ravel() for array in (facts.values, facts.query_positions))
        known = np.column_stack([row_of_value, clue(facts.keys.reshape(-1, n))])
        asked = np.column_stack([row_of_query, clue(facts.queries.reshape(-1, n))])
        answers = np.take_along_axis(targets, facts.query_positions, axis=1)
        found = np.zeros(targets.shape)
        chance = guess_probability(known, facts.values.ravel(), asked, answers.ravel())
        np.put_along_axis(found, facts.query_positions, chance.reshape(answers.shape), axis=1)
        return found


def _group(groups: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """A rank for each of the M chosen entries of N x P groups: each row's groups one after the other, in order of appearance.

    Groups with a single chosen entry come last.
    """
    rows, _ = np.nonzero(chosen)
    entries = rows * (int(groups.max()) + 1) + groups[chosen]
    _, first, inverse, size = np.unique(entries, return_index=True, return_inverse=True, return_counts=True)
    rank: np.ndarray = first[inverse] + len(entries) * (size == 1)[inverse]
    return rank


@functools.cache
def _values(task: Needles) -> np.ndarray:
    """The tokens that are values, most frequent first. Raises ValueError if the training split has too few different tokens."""
    counts = np.bincount(tokens_of(task, "train"))
    if task.values > (different := np.count_nonzero(counts)):
        raise ValueError(f"values = {task.values} exceeds the {different} different tokens in the train split of {task.source}")
    return np.argsort(-counts, kind="stable")[: task.values]
