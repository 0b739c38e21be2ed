"""Text as numbers: its bytes, pairs of bytes merged into larger and larger pieces (BPE), or the words between white space.

What is learnt, is learnt from the training split, and comes out the same every time. A saved tokenizer is a file of the
`tokenizers` library.
"""

from __future__ import annotations

import codecs
import io
import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

from cat.tasks.corpus import ends_a_word

if TYPE_CHECKING:
    import tokenizers

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

    @abstractmethod
    def spell(self, token: int, after: int | None) -> bytes:
        """The bytes that a token adds to a text whose last token is `after`; None before the first."""

    def decode(self, tokens: Iterable[int], after: int | None = None) -> Iterator[str]:
        """The text of `tokens` as they come, one after the other, behind the token `after`.

        Bytes that are no whole character wait for those that complete it; what never becomes one is U+FFFD.
        """
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        for token in tokens:
            yield utf8.decode(self.spell(token, after))
            after = token
        yield utf8.decode(b"", final=True)


def load(saved: str) -> Tokenizer:
    """The tokenizer that `save` made this JSON of."""
    import tokenizers

    if json.loads(saved)["model"]["type"] == "BPE":
        return BPE(tokenizers.Tokenizer.from_str(saved))
    return Words(json.loads(saved)["model"]["vocab"])


class Bytes(Tokenizer):
    """A token a byte."""

    size = 256

    def encode(self, text: np.ndarray) -> np.ndarray:
        return text

    def sizes(self, text: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        return np.ones(len(text), dtype=np.int64)

    def spell(self, token: int, after: int | None) -> bytes:
        return bytes([token])


class BPE(Tokenizer):
    """Pieces of words: the 256 bytes, so that nothing is unknown, and what merges most often."""

    def __init__(self, learnt: tokenizers.Tokenizer):
        self._learnt = learnt
        self.size = learnt.get_vocab_size()
        byte = _bytes_by_letter()
        pieces = sorted(learnt.get_vocab().items(), key=lambda entry: entry[1])
        self._pieces = [bytes(byte[letter] for letter in piece) for piece, _ in pieces]
        self._sizes = np.array([len(piece) for piece in self._pieces])

    @classmethod
    def learn(cls, text: np.ndarray, size: int) -> BPE:
        """Of a text, `size` pieces at most."""
        from tokenizers import Tokenizer as Learnt
        from tokenizers import decoders, models, pre_tokenizers, trainers

        bytewise = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=bytewise.alphabet(), show_progress=False)
        learnt = Learnt(models.BPE())
        learnt.pre_tokenizer = bytewise
        learnt.decoder = decoders.ByteLevel()
        learnt.train_from_iterator(_lines(text), trainer)
        return cls(learnt)

    def encode(self, text: np.ndarray) -> np.ndarray:
        encoded = chain.from_iterable(map(self._learnt.encode_batch_fast, _lines(text)))
        return np.fromiter(chain.from_iterable(line.ids for line in encoded), np.min_scalar_type(self.size - 1))

    def sizes(self, text: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        return self._sizes[tokens]

    def save(self) -> str:
        return self._learnt.to_str(pretty=True)

    def spell(self, token: int, after: int | None) -> bytes:
        return self._pieces[token]


class Words(Tokenizer):
    """The words of the training split, or the most frequent of them; <unk> for all others, <eos> for the end of a line."""

    def __init__(self, known: Mapping[str, int]):
        self._known = {word.encode(): place for word, place in known.items()}
        self._words = sorted(self._known, key=self._known.__getitem__)
        self.size = len(self._known)

    @classmethod
    def learn(cls, text: np.ndarray, size: int | None) -> Words:
        """Of a text, `size` words at most; all of them for None."""
        counts = Counter(_words(text))
        special = [UNKNOWN.encode(), END_OF_LINE.encode()]
        others = sorted((word for word in counts if word not in special), key=lambda word: (-counts[word], word))
        words = special + others[: None if size is None else size - 2]
        return cls({word.decode(): place for place, word in enumerate(words)})

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

    def spell(self, token: int, after: int | None) -> bytes:
        """Words with a space between two of them, <eos> as the end of the line that it is."""
        word, end = self._words[token], END_OF_LINE.encode()
        if word == end:
            return b"\n"
        return word if after is None or self._words[after] == end else b" " + word


def _bytes_by_letter() -> dict[str, int]:
    """The byte that a letter of a piece stands for: the one of its number where that can be seen, the others from 256 on."""
    shown = [byte for byte in range(33, 256) if chr(byte).isprintable()]
    others = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + place): byte for place, byte in enumerate(others)}


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
