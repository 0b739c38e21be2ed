"""Next-token prediction on real text: bytes, BPE pieces or words.

Test splits compare lengths fairly: the targets are the same tokens at every length, the last half of the shortest window. Longer
windows only add context before them.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Self

import numpy as np
from pydantic import model_validator

from cat.config import Count
from cat.tasks.base import IGNORE, Examples, Extents, GeneratedData, Recalled, Spans, Windows
from cat.tasks.corpus import ends_a_word, read
from cat.tasks.encoded import EncodedText, tokenizer_of, tokens_of
from cat.tasks.ngrams import check_packing, occurs, occurs_earlier, pack
from cat.tasks.witten_bell import ngram_bits

ORDERS = {"bigram": 2, "trigram": 3, "fourgram": 4, "fivegram": 5}
"""Tables of n-grams that text is compared with: name -> n."""


class Text(EncodedText):
    """Windows of a corpus. Training windows start at random; each split has its own part of the corpus."""

    example: ClassVar = {"source": "python-docs"}
    kind: Literal["text"]
    ngram: Count | None = None
    """Also score answers by whether they can be recalled: the n tokens before occur earlier, followed by the same answer."""

    @model_validator(mode="after")
    def _check_context(self) -> Self:
        if self.lengths[0] < 2:
            raise ValueError(f"a window of {self.lengths[0]} token has no context")
        return self

    @model_validator(mode="after")
    def _check_ngram(self) -> Self:
        if self.ngram is not None:
            if self.ngram > (context := self.lengths[0] - self._targets):
                raise ValueError(
                    f"ngram = {self.ngram} exceeds the {context} tokens before the targets of the shortest test window"
                )
            if (largest := 256 if self.tokens == "bytes" else self.vocabulary_size) is not None:
                check_packing(largest, self.ngram + 1)
        return self

    @property
    def vocabulary(self) -> int:
        """Vocabulary size. Unless tokens are bytes, this reads the training split; raises ValueError if it cannot be read."""
        return tokenizer_of(self).size

    @property
    def goal(self) -> Literal["loss"]:
        return "loss"

    def training(self, length: int, generator: np.random.Generator) -> Windows:
        """Raises ValueError if the source has too little text."""
        return self._windows("train", length, self.training_counts[length], generator)

    def examples(self, split: str, length: int, count: int, generator: np.random.Generator) -> Examples:
        """Cut the windows of a split. Raises ValueError if the source has too little text.

        Test windows end at the same tokens at every length and do not depend on `generator`.
        """
        inputs, targets = self._windows(split, length, count, generator).rows()
        if split == "test":
            targets[:, : length - self._targets] = IGNORE
        return Examples(inputs, targets)

    def _windows(self, split: str, length: int, count: int, generator: np.random.Generator) -> Windows:
        tokens = tokens_of(self, split)
        longest = self.lengths[-1] if split == "test" else length
        room = len(tokens) - longest
        if room < (1 if split == "train" else count):
            unit = "bytes" if self.tokens == "bytes" else "tokens"
            raise ValueError(
                f"the {split} split of {self.source} has {len(tokens)} {unit}, too few for {count} windows of {longest} {unit}"
            )
        starts = generator.integers(0, room, size=count) if split == "train" else _evenly_spaced(count, room)
        return Windows(tokens, longest - length + starts, length)

    @property
    def _targets(self) -> int:
        """Target positions per test window, at its end."""
        return (self.lengths[0] + 1) // 2

    @property
    def reference_labels(self) -> dict[str, str]:
        """The n-gram tables whose context fits before every target."""
        context = self.lengths[0] - self._targets + 1
        return {name: f"count {n}-grams of the training text" for name, n in ORDERS.items() if n <= context + 1}

    def score_references(self, data: GeneratedData) -> dict[str, dict[int, float]]:
        """Bits per byte by tables that count the training windows, the same at every length as the targets are."""
        if not self.reference_names:
            return {}
        training = [windows for windows in data.training if isinstance(windows, Windows)]
        assert data.extents is not None
        inputs, targets = (np.asarray(array, dtype=np.int64) for array in data.tests[self.lengths[-1]])
        rows, positions = np.nonzero(targets >= 0)
        before = np.arange(2 - max(ORDERS[name] for name in self.reference_names), 1)
        asked = np.column_stack([inputs[rows[:, None], positions[:, None] + before], targets[targets >= 0]])
        bits = ngram_bits(training, asked, data.vocabulary).sum(0) + 8 * data.extents.unknown.sum()
        return {
            name: dict.fromkeys(data.tests, float(bits[ORDERS[name] - 1] / data.extents.bytes.sum()))
            for name in self.reference_names
        }

    def extents(self) -> Extents:
        text, tokens = read(self.source, self.folder, "test"), tokens_of(self, "test")
        tokenizer, ends = tokenizer_of(self), self._last_targets() + 1
        starts = ends - self._targets
        offsets, unknown = (
            np.concatenate([[0], np.cumsum(count(text, tokens))]) for count in (tokenizer.sizes, tokenizer.unknown)
        )
        words = np.searchsorted(np.flatnonzero(ends_a_word(text)) + 1, offsets, side="right")  # words that end by each offset
        return Extents(*(total[ends] - total[starts] for total in (offsets, words, unknown)))

    def spans(self) -> Spans:
        text, tokens = read(self.source, self.folder, "test"), tokens_of(self, "test")
        tokenizer, ends = tokenizer_of(self), self._last_targets()
        return Spans(*(_windows(count(text, tokens), ends, self.lengths[-1]) for count in (tokenizer.sizes, tokenizer.unknown)))

    def recalled(self) -> dict[int, Recalled] | None:
        """Raises ValueError if the n-grams do not fit in 64 bits."""
        if self.ngram is None:
            return None
        n, vocabulary = self.ngram + 1, self.vocabulary  # the n-gram with its answer
        check_packing(vocabulary, n)
        packed = pack(_windows(tokens_of(self, "test"), self._last_targets(), self.lengths[-1] + 1), n, vocabulary)
        in_training = occurs(packed[:, -self._targets :], tokens_of(self, "train"), n, vocabulary)
        by_length = {length: occurs_earlier(packed[:, self.ngram - length - 1 :])[:, -self._targets :] for length in self.lengths}
        return {length: Recalled(recalled, recalled & ~in_training) for length, recalled in by_length.items()}

    def _last_targets(self) -> np.ndarray:
        """The index in the text of the last target of each test window."""
        longest = self.lengths[-1]
        return longest + _evenly_spaced(self.test_examples, len(tokens_of(self, "test")) - longest)


def _windows(array: np.ndarray, ends: np.ndarray, length: int) -> np.ndarray:
    """The `length` entries up to and including each of `ends`."""
    return np.lib.stride_tricks.sliding_window_view(array, length)[ends - length + 1]


def _evenly_spaced(count: int, room: int) -> np.ndarray:
    return np.arange(count) * room // count
