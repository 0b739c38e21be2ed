"""Next-token prediction over real text: byte by byte, in merged pieces, or word by word.

Test splits compare lengths fairly: the same tokens are predicted at every length, the last half of the shortest window, with
more context before them the longer the window is.
"""

from __future__ import annotations

import functools
from typing import Annotated, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from cat.config import Count
from cat.tasks.base import IGNORE, Examples, Extents, Recalled, Spans, Task, Windows
from cat.tasks.corpus import WIKITEXT, digests, ends_a_word, read
from cat.tasks.ngrams import check_packing, occurs, pack, stood_before
from cat.tasks.tokenizer import BPE, Bytes, Tokenizer, Words


class Text(Task):
    """Windows of a corpus. Training windows are drawn at random; validation and test windows from files of their own."""

    kind: Literal["text"]
    source: Annotated[str, Field(min_length=1)]
    """`python-docs`, `wikitext-103`, or the path of a text file or of a folder of `.txt` and `.md` files, in UTF-8."""
    folder: Annotated[str, Field(min_length=1)] | None = None
    """Where `wiki.train.tokens`, `wiki.valid.tokens` and `wiki.test.tokens` of WikiText-103 lie; without it they are fetched."""
    tokens: Literal["bytes", "bpe", "words"] = "bytes"
    """What is predicted: bytes; pieces of words, learnt from the training split by merging bytes; or its words."""
    vocabulary_size: Annotated[int, Field(ge=3, le=1 << 20)] | None = None
    """Different tokens at most, for bpe and words; without it, words are all those of the training split."""
    ngram: Count | None = None
    """Tell answers apart by whether the last so many tokens stood in the context before, with the answer after them."""

    @model_validator(mode="after")
    def _something_is_scored(self) -> Self:
        if self.lengths[0] < 2:
            raise ValueError(f"a window of {self.lengths[0]} token has no context")
        return self

    @model_validator(mode="after")
    def _keys_agree(self) -> Self:
        if self.folder is not None and self.source != WIKITEXT:
            raise ValueError(f"folder is where {WIKITEXT} lies; another corpus is named by its path, as the source")
        if self.tokens == "bytes" and self.vocabulary_size is not None:
            raise ValueError(f"vocabulary_size = {self.vocabulary_size} with tokens = bytes, which are 256; take bpe or words")
        if self.tokens == "bpe" and self.vocabulary_size is None:
            raise ValueError("tokens = bpe needs vocabulary_size, the number of bytes and merges")
        if self.tokens == "bpe" and self.vocabulary_size is not None and self.vocabulary_size <= 256:
            raise ValueError(f"vocabulary_size = {self.vocabulary_size} leaves nothing to merge: bpe begins with 256 bytes")
        return self

    @model_validator(mode="after")
    def _ngrams_fit(self) -> Self:
        if self.ngram is not None:
            if self.ngram > (before := self.lengths[0] - self._scored):
                raise ValueError(f"ngram = {self.ngram} is more than the {before} tokens before the answers of a test window")
            if (most := 256 if self.tokens == "bytes" else self.vocabulary_size) is not None:
                check_packing(most, self.ngram + 1)
        return self

    @property
    def vocabulary(self) -> int:
        """Known only once the training split is read, but for bytes. Raises ValueError where it cannot be."""
        return _tokenizer(self).size

    @property
    def goal(self) -> Literal["loss"]:
        return "loss"

    def training(self, generator: np.random.Generator) -> Windows:
        """Raises ValueError where the source has too little text for it."""
        return self._windows("train", self.length, self.train_examples, generator)

    def examples(self, split: str, length: int, count: int, generator: np.random.Generator) -> Examples:
        """Raises ValueError where the source has too little text for the split.

        The windows of a test split end at the same tokens at every length, whatever `generator` is.
        """
        inputs, targets = self._windows(split, length, count, generator).rows()
        if split == "test":
            targets[:, : length - self._scored] = IGNORE
        return Examples(inputs, targets)

    def _windows(self, split: str, length: int, count: int, generator: np.random.Generator) -> Windows:
        tokens = _tokens(self, split)
        longest = self.lengths[-1] if split == "test" else length
        room = len(tokens) - longest
        if room < (1 if split == "train" else count):
            unit = "bytes" if self.tokens == "bytes" else "tokens"
            raise ValueError(
                f"the {split} split of {self.source} has {len(tokens)} {unit}, too few for {count} windows of {longest} {unit}"
            )
        starts = generator.integers(0, room, size=count) if split == "train" else _spread(count, room)
        return Windows(tokens, longest - length + starts, length)

    @property
    def _scored(self) -> int:
        """Tokens of a test window that are asked, at its end."""
        return (self.lengths[0] + 1) // 2

    def extents(self) -> Extents:
        text, tokens = read(self.source, self.folder, "test"), _tokens(self, "test")
        learnt, after = _tokenizer(self), self._test_ends() + 1
        before = after - self._scored
        offsets, unknown = (np.concatenate([[0], np.cumsum(count(text, tokens))]) for count in (learnt.sizes, learnt.unknown))
        words = np.searchsorted(np.flatnonzero(ends_a_word(text)) + 1, offsets, side="right")  # that ended by then
        return Extents(*(total[after] - total[before] for total in (offsets, words, unknown)))

    def spans(self) -> Spans:
        text, tokens = read(self.source, self.folder, "test"), _tokens(self, "test")
        learnt, ends = _tokenizer(self), self._test_ends()
        return Spans(*(_windows(count(text, tokens), ends, self.lengths[-1]) for count in (learnt.sizes, learnt.unknown)))

    def recalled(self) -> dict[int, Recalled] | None:
        """Raises ValueError where runs of so many tokens do not fit in 64 bits."""
        if self.ngram is None:
            return None
        run, vocabulary = self.ngram + 1, self.vocabulary
        check_packing(vocabulary, run)
        packed = pack(_windows(_tokens(self, "test"), self._test_ends(), self.lengths[-1] + 1), run, vocabulary)
        common = occurs(packed[:, -self._scored :], _tokens(self, "train"), run, vocabulary)
        again = {length: stood_before(packed[:, self.ngram - length - 1 :])[:, -self._scored :] for length in self.lengths}
        return {length: Recalled(recalled, recalled & ~common) for length, recalled in again.items()}

    def _test_ends(self) -> np.ndarray:
        """Where the last answer of each test window stands."""
        longest = self.lengths[-1]
        return longest + _spread(self.test_examples, len(_tokens(self, "test")) - longest)

    def tokenizer(self) -> str | None:
        return _tokenizer(self).save()

    def origin(self) -> dict[str, str]:
        return digests(self.source, self.folder)


def _windows(array: np.ndarray, ends: np.ndarray, length: int) -> np.ndarray:
    """The `length` entries up to each of the `ends`."""
    return np.lib.stride_tricks.sliding_window_view(array, length)[ends - length + 1]


def _spread(count: int, room: int) -> np.ndarray:
    return np.arange(count) * room // count


@functools.cache
def _tokenizer(task: Text) -> Tokenizer:
    if task.tokens == "bytes":
        return Bytes()
    text = read(task.source, task.folder, "train")
    if task.tokens == "words":
        return Words.learn(text, task.vocabulary_size)
    assert task.vocabulary_size is not None  # as a rule of the class has it
    return BPE.learn(text, task.vocabulary_size)


@functools.cache
def _tokens(task: Text, split: str) -> np.ndarray:
    """A split in tokens."""
    return _tokenizer(task).encode(read(task.source, task.folder, split))
