"""Next-token prediction on real text: bytes, BPE pieces or words.

Test splits compare lengths fairly: the targets are the same tokens at every length. The last half of each of the longest windows
is a region. Shorter windows, side by side, end with the parts of the region. So a window of L tokens scores its last half:

    L       context |===============| region        each target has L / 2 to L tokens before it
    L / 2           context |=======|
                context |=======|

All lengths together cost two tokens per target and length.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Self

import numpy as np
from pydantic import model_validator

from cat.config import Count
from cat.tasks.base import IGNORE, Examples, Extents, GeneratedData, Recalled, Windows
from cat.tasks.compressors import COMPRESSORS, compressed_bits
from cat.tasks.corpus import ends_a_word, read
from cat.tasks.encoded import EncodedText, tokenizer_of, tokens_of
from cat.tasks.ngrams import check_packing, occurs, occurs_earlier, pack
from cat.tasks.passages import follows_passage
from cat.tasks.witten_bell import ngram_bits

ORDERS = {"bigram": 2, "trigram": 3, "fourgram": 4, "fivegram": 5}
"""Tables of n-grams that text is compared with: name -> n."""


class Text(EncodedText):
    """Windows of a corpus. Training windows start at random; each split has its own part of the corpus.

    `test_examples` is the number of scored regions.
    """

    example: ClassVar = {"source": "python-docs"}
    kind: Literal["text"]
    ngram: Count | None = None
    """Also score answers by whether they can be recalled: the n tokens before occur earlier, followed by the same answer."""

    @model_validator(mode="after")
    def _check_context(self) -> Self:
        if self.lengths[0] < 2:
            raise ValueError(f"a window of {self.lengths[0]} token has no context")
        if self.min_test_examples is not None:
            raise ValueError(f"min_test_examples = {self.min_test_examples} has no effect: every length scores the same bytes")
        return self

    @model_validator(mode="after")
    def _check_ngram(self) -> Self:
        if self.ngram is not None:
            if self.ngram > (context := self.lengths[0] // 2):
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

        The test split has the windows of `count` regions, in the order of the text. It does not depend on `generator`.
        """
        if split != "test":
            return Examples(*self._windows(split, length, count, generator).rows())
        tokens, (begins, ends) = tokens_of(self, "test"), self._parts(length)
        inputs, targets = Windows(tokens, ends - length, length).rows()
        targets[np.arange(length) < length - (ends - begins)[:, None]] = IGNORE
        return Examples(inputs, targets)

    def _windows(self, split: str, length: int, count: int, generator: np.random.Generator) -> Windows:
        tokens = tokens_of(self, split)
        room = len(tokens) - length
        if room < (1 if split == "train" else count):
            unit = self._unit
            raise ValueError(
                f"the {split} split of {self.source} has {len(tokens)} {unit}, too few for {count} windows of {length} {unit}"
            )
        starts = generator.integers(0, room, size=count) if split == "train" else _evenly_spaced(count, room)
        return Windows(tokens, starts, length)

    @property
    def _unit(self) -> str:
        return "bytes" if self.tokens == "bytes" else "tokens"

    @property
    def _region(self) -> int:
        """Targets per region."""
        return (self.lengths[-1] + 1) // 2

    def _regions(self) -> np.ndarray:
        """The index in the text before the first target of each region. Raises ValueError if regions overlap."""
        tokens, longest, count = len(tokens_of(self, "test")), self.lengths[-1], self.test_examples
        room = tokens - 1 - (longest - self._region)
        if room < count * self._region:
            raise ValueError(
                f"the test split of {self.source} has {tokens} {self._unit}, too few for test_examples = {count} regions of"
                f" {self._region} {self._unit}, half the longest test length. Fix: at most {max(room // self._region, 0)} regions"
            )
        return longest - self._region + _evenly_spaced(count, room)

    def _parts(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Before the first target and at the last target of each window of `length` tokens: parts of all regions, in order."""
        cuts = np.arange(0, (count := -(-self._region // ((length + 1) // 2))) + 1) * self._region // count
        regions = self._regions()[:, None]
        return (regions + cuts[:-1]).ravel(), (regions + cuts[1:]).ravel()

    def _is_target(self) -> np.ndarray:
        """Whether each token of the test split is a target."""
        index = self._regions()[:, None] + 1 + np.arange(self._region)
        return np.isin(np.arange(len(tokens_of(self, "test"))), index)

    @property
    def reference_labels(self) -> dict[str, str]:
        """The n-gram tables whose context fits before every target, and compression programs."""
        context = self.lengths[0] // 2 + 1
        tables = {name: f"count {n}-grams of the training text" for name, n in ORDERS.items() if n <= context + 1}
        return tables | {name: f"compress with {name} after the training text" for name in COMPRESSORS}

    def score_references(self, data: GeneratedData) -> dict[str, dict[int, float]]:
        """Bits per byte, the same at every length as the targets are. The tables count the training windows."""
        training = [windows for windows in data.training if isinstance(windows, Windows)]
        assert data.extents is not None
        assert data.tokenizer is not None
        inputs, targets = (np.asarray(array, dtype=np.int64) for array in data.tests[self.lengths[-1]])
        rows, positions = np.nonzero(targets >= 0)
        orders = {name: ORDERS[name] for name in self.reference_names if name in ORDERS}
        bits: dict[str, float] = {}
        if orders:
            before = np.arange(2 - max(orders.values()), 1)
            asked = np.column_stack([inputs[rows[:, None], positions[:, None] + before], targets[targets >= 0]])
            by_order = ngram_bits(training, asked, data.vocabulary).sum(0)
            bits = {name: float(by_order[n - 1]) for name, n in orders.items()}
        known, scored = (data.tokenizer.join(tokens) for tokens in (training[0].tokens, targets[targets >= 0]))
        bits |= {name: compressed_bits(name, scored, known) for name in COMPRESSORS}
        size, unknown = data.extents.bytes.sum(), 8 * data.extents.unknown.sum()
        return {name: dict.fromkeys(data.tests, float((bits[name] + unknown) / size)) for name in self.reference_names}

    def extents(self) -> Extents:
        text, tokens = read(self.source, self.folder, "test"), tokens_of(self, "test")
        tokenizer, starts = tokenizer_of(self), self._regions() + 1
        ends = starts + self._region
        offsets, unknown = (
            np.concatenate([[0], np.cumsum(count(text, tokens))]) for count in (tokenizer.sizes, tokenizer.unknown)
        )
        words = np.searchsorted(np.flatnonzero(ends_a_word(text)) + 1, offsets, side="right")  # words that end by each offset
        return Extents(*(total[ends] - total[starts] for total in (offsets, words, unknown)))

    def overlap(self) -> float:
        text, tokens = read(self.source, self.folder, "test"), tokens_of(self, "test")
        follows = follows_passage(text, read(self.source, self.folder, "train"))
        is_target = np.repeat(self._is_target(), tokenizer_of(self).sizes(text, tokens))
        return float(follows[: len(is_target)][is_target].mean())

    def recalled(self) -> dict[int, Recalled] | None:
        """Raises ValueError if the n-grams do not fit in 64 bits."""
        if self.ngram is None:
            return None
        n, vocabulary, tokens = self.ngram + 1, self.vocabulary, tokens_of(self, "test")  # the n-gram with its answer
        check_packing(vocabulary, n)
        packed = pack(tokens, n, vocabulary)
        in_training = occurs(packed, tokens_of(self, "train"), n, vocabulary)
        masks = {}
        for length in self.lengths:
            begins, ends = self._parts(length)
            windows = np.lib.stride_tricks.sliding_window_view(packed, length + 1 - self.ngram)[ends - length]
            is_target = np.arange(windows.shape[1]) >= windows.shape[1] - (ends - begins)[:, None]
            recalled = occurs_earlier(windows)[is_target].reshape(self.test_examples, -1)
            rare = ~in_training[self._regions()[:, None] + 1 - self.ngram + np.arange(self._region)]
            masks[length] = Recalled(recalled, recalled & rare)
        return masks


def _evenly_spaced(count: int, room: int) -> np.ndarray:
    return np.arange(count) * room // count
