"""Tables of n-grams with Witten-Bell smoothing: how well a text can be predicted by counting (Witten and Bell, 1991).

    p_n(w | h) = (count(h w) + types(h) p_(n-1)(w | h')) / (count(h) + types(h))

h is the n - 1 tokens before w, and h' the last n - 2 of them. types(h) is the number of different tokens that follow h in the
training text. p_0 is uniform over the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from cat.tasks.base import Windows

CHUNK_TOKENS = 1 << 22
"""Tokens of the training text that are counted at a time, to bound memory."""


def ngram_bits(training: Sequence[Windows], asked: np.ndarray, vocabulary: int) -> np.ndarray:
    """Bits of the last of n tokens given the others, by tables of 1-grams to n-grams: A x n for `asked`, A x n.

    The tables count each token that is a target of at least one training window once. The windows, by length, are cut from one
    text. Only contexts of `asked` are counted.
    """
    answers, counters = asked[:, -1], [_Counter(asked[:, :-1], order, vocabulary) for order in range(asked.shape[1])]
    for positions in _target_positions(training):
        contexts = np.zeros(len(positions), dtype=np.int64)
        for counter in counters:
            positions, contexts = counter.add(training[0].tokens, positions, contexts)
    probabilities = [np.full(len(asked), 1 / vocabulary)]
    for counter in counters:
        probabilities.append(counter.smoothed(answers, probabilities[-1]))
    return -np.log2(np.stack(probabilities[1:], axis=1))


class _Counter:
    """Counts which tokens follow the contexts of `order` tokens that the questions have. Contexts have numbers."""

    def __init__(self, before: np.ndarray, order: int, vocabulary: int):
        """`before` has the tokens before each answer, the last one nearest to it."""
        self.order, self.vocabulary = order, vocabulary
        self.asked = np.zeros(len(before), dtype=np.int64)
        """The number of the context of each question."""
        self.table = np.zeros(1, dtype=np.int64)
        """Packed (number of the context without its first token, first token) of each context, sorted."""
        for distance in range(1, order + 1):
            self.table, self.asked = np.unique(self._pack(self.asked, before[:, -distance]), return_inverse=True)
        self._chunks: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, tokens: np.ndarray, positions: np.ndarray, contexts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Count the tokens at `positions`; `contexts` are the numbers of their contexts of `order` - 1 tokens.

        Returns the positions whose context of `order` tokens is asked, and the numbers of these contexts.
        """
        if self.order:
            inside = positions >= self.order
            positions, contexts = positions[inside], contexts[inside]
            packed = self._pack(contexts, tokens[positions - self.order])
            place = np.searchsorted(self.table, packed)
            found = self.table[np.minimum(place, len(self.table) - 1)] == packed
            positions, contexts = positions[found], place[found]
        self._chunks.append(np.unique(self._pack(contexts, tokens[positions]), return_counts=True))
        return positions, contexts

    def smoothed(self, answers: np.ndarray, shorter: np.ndarray) -> np.ndarray:
        """The probability of each answer; `shorter` is the one by contexts without their first token."""
        followers, inverse = np.unique(np.concatenate([grams for grams, _ in self._chunks]), return_inverse=True)
        counts = np.bincount(inverse, np.concatenate([counts for _, counts in self._chunks]), minlength=len(followers))
        context, size = followers // self.vocabulary, len(self.table)
        total, types = np.bincount(context, counts, size)[self.asked], np.bincount(context, minlength=size)[self.asked]
        place = np.searchsorted(followers, packed := self._pack(self.asked, answers))
        place = np.minimum(place, len(followers) - 1)
        count = np.where(followers[place] == packed, counts[place], 0)
        seen = total > 0
        return np.where(seen, (count + types * shorter) / np.where(seen, total + types, 1), shorter)

    def _pack(self, contexts: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        return contexts * self.vocabulary + tokens


def _target_positions(training: Sequence[Windows]) -> Iterator[np.ndarray]:
    """Yield every position of the text that is a target of at least one window once, in chunks."""
    starts = np.concatenate([windows.starts for windows in training])
    ends = np.concatenate([windows.starts + windows.length for windows in training])
    order = np.argsort(starts, kind="stable")
    starts, ends = starts[order], np.maximum.accumulate(ends[order])
    begins = np.maximum(starts, np.concatenate([[0], ends[:-1]]))  # windows overlap
    longest = max(windows.length for windows in training)
    for first in range(0, len(starts), step := max(1, CHUNK_TOKENS // longest)):
        begin, end = begins[first : first + step], ends[first : first + step]
        sizes = end - begin
        offsets = np.repeat(np.cumsum(sizes) - sizes, sizes)
        yield np.repeat(begin, sizes) + np.arange(sizes.sum()) - offsets + 1
