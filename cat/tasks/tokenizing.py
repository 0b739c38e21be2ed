"""Text as numbers: its bytes, pairs of bytes merged into larger and larger pieces (BPE), or the words between white space.

What is learnt, is learnt from the training split, and comes out the same every time. A saved tokenizer is a file of the
`tokenizers` library.
"""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from itertools import chain

import numpy as np

from cat.tasks.corpora import ends_a_word

UNKNOWN, END_OF_LINE = "<unk>", "<eos>"


class Tokenizer(ABC):
    """Between the bytes of a text and its tokens."""

    size: int
    """Different tokens."""

    @abstractmethod
    def encode(self, text: np.ndarray) -> np.ndarray:
        """The tokens of a text of N bytes, in the smallest unsigned type that holds them."""

    @abstractmethod
    def sizes(self, text: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """How many bytes of the text each of its `tokens` stands for."""

    def unknown(self, text: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """How many of them the token does not tell: those of a word outside the vocabulary."""
        return np.zeros(len(tokens), dtype=np.int64)

    def save(self) -> str | None:
        """What was learnt, as the JSON of a tokenizer of the `tokenizers` library; None where nothing was."""
        return None


class Bytes(Tokenizer):
    """A token a byte."""

    size = 256

    def encode(self, text: np.ndarray) -> np.ndarray:
        return text

    def sizes(self, text: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        return np.ones(len(text), dtype=np.int64)


class BPE(Tokenizer):
    """Pieces of words, `size` of them at most: the 256 bytes, so that nothing is unknown, and what merges most often."""

    def __init__(self, text: np.ndarray, size: int):
        from tokenizers import Tokenizer as Learnt
        from tokenizers import decoders, models, pre_tokenizers, trainers

        bytewise = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=bytewise.alphabet(), show_progress=False)
        self._learnt = Learnt(models.BPE())
        self._learnt.pre_tokenizer = bytewise
        self._learnt.decoder = decoders.ByteLevel()
        self._learnt.train_from_iterator(_lines(text), trainer)
        self.size = self._learnt.get_vocab_size()
        pieces = sorted(self._learnt.get_vocab().items(), key=lambda entry: entry[1])
        self._sizes = np.array([len(piece) for piece, _ in pieces])  # a piece is written as a character a byte

    def encode(self, text: np.ndarray) -> np.ndarray:
        encoded = chain.from_iterable(map(self._learnt.encode_batch_fast, _lines(text)))
        return np.fromiter(chain.from_iterable(line.ids for line in encoded), np.min_scalar_type(self.size - 1))

    def sizes(self, text: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        return self._sizes[tokens]

    def save(self) -> str:
        return self._learnt.to_str(pretty=True)


class Words(Tokenizer):
    """The words of the training split, or the most frequent of them; <unk> for all others, <eos> for the end of a line."""

    def __init__(self, text: np.ndarray, size: int | None):
        counts = Counter(_words(text))
        special = [UNKNOWN.encode(), END_OF_LINE.encode()]
        others = sorted((word for word in counts if word not in special), key=lambda word: (-counts[word], word))
        self._known = {word: place for place, word in enumerate(special + others[: None if size is None else size - 2])}
        self.size = len(self._known)

    def encode(self, text: np.ndarray) -> np.ndarray:
        get = self._known.get
        return np.fromiter((get(word, 0) for word in _words(text)), np.min_scalar_type(self.size - 1))

    def sizes(self, text: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        return np.diff(np.flatnonzero(ends_a_word(text)) + 1, prepend=0)

    def unknown(self, text: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        lengths = (0 if word in self._known else len(word) for word in _words(text))
        return np.fromiter(lengths, np.int64)

    def save(self) -> str:
        from tokenizers import Regex, models, normalizers, pre_tokenizers
        from tokenizers import Tokenizer as Saved

        words = {word.decode(): place for word, place in self._known.items()}
        saved = Saved(models.WordLevel(words, unk_token=UNKNOWN))
        saved.normalizer = normalizers.Replace("\n", f" {END_OF_LINE} ")
        saved.pre_tokenizer = pre_tokenizers.Split(Regex(r"[ \t\r\v\f]+"), "removed")
        return saved.to_str(pretty=True)


def _lines(text: np.ndarray) -> Iterator[list[str]]:
    """Some lines at a time: BPE merges nothing across their ends."""
    file = io.TextIOWrapper(io.BytesIO(text.data), encoding="utf-8", newline="\n")
    return iter(lambda: file.readlines(1 << 20), [])


def _words(text: np.ndarray) -> Iterator[bytes]:
    """The words in order, as `ends_a_word` tells them apart."""
    for line in io.BytesIO(text.data):
        yield from line.split()
        if line.endswith(b"\n"):
            yield END_OF_LINE.encode()
