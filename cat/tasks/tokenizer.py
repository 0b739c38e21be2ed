"""Tokenizers: bytes, byte-level BPE, or words separated by white space.

BPE and words are trained on the training split, deterministically. A saved tokenizer is a file of the `tokenizers` library.
"""

from __future__ import annotations

import codecs
import io
import itertools
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
LONGEST = 256
"""Bytes of the longest BPE piece: training cuts longer runs of letters or of spaces, encoding does not."""


class Tokenizer(ABC):
    """Maps the bytes of a text to tokens and back."""

    size: int
    """Vocabulary size."""

    @abstractmethod
    def encode(self, text: np.ndarray) -> np.ndarray:
        """Encode a text of N bytes; returns tokens in the smallest unsigned type that holds them."""

    @abstractmethod
    def sizes(self, text: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Bytes of the text that each of its `tokens` stands for."""

    def unknown(self, text: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Bytes per token that the token does not determine: those of words outside the vocabulary."""
        return np.zeros(len(tokens), dtype=np.int64)

    def save(self) -> str | None:
        """The tokenizer as JSON of the `tokenizers` library; None for bytes, which need no training."""
        return None

    @abstractmethod
    def spell(self, token: int, after: int | None) -> bytes:
        """The bytes that `token` adds to a text whose last token is `after`, or None if it is the first."""

    def join(self, tokens: np.ndarray) -> bytes:
        """The bytes of a whole text."""
        return b"".join(self.spell(token, after) for after, token in itertools.pairwise(chain([None], tokens.tolist())))

    def decode(self, tokens: Iterable[int], after: int | None = None) -> Iterator[str]:
        """Decode a stream of tokens that follows the token `after`; yields one text per token, then the rest.

        Incomplete characters wait for their remaining bytes; invalid bytes become U+FFFD.
        """
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        for token in tokens:
            yield utf8.decode(self.spell(token, after))
            after = token
        yield utf8.decode(b"", final=True)


def load(saved: str) -> Tokenizer:
    """Load a tokenizer from the JSON of `Tokenizer.save`."""
    import tokenizers

    if json.loads(saved)["model"]["type"] == "BPE":
        return BPE(tokenizers.Tokenizer.from_str(saved))
    return Words(json.loads(saved)["model"]["vocab"])


class Bytes(Tokenizer):
    """One token per byte."""

    size = 256

    def encode(self, text: np.ndarray) -> np.ndarray:
        return text

    def sizes(self, text: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        return np.ones(len(text), dtype=np.int64)

    def join(self, tokens: np.ndarray) -> bytes:
        return tokens.astype(np.uint8).tobytes()

    def spell(self, token: int, after: int | None) -> bytes:
        return bytes([token])


class BPE(Tokenizer):
    """Byte-level BPE: the 256 bytes, so no text is unknown, and the most frequent merges."""

    def __init__(self, tokenizer: tokenizers.Tokenizer):
        self._tokenizer = tokenizer
        self.size = tokenizer.get_vocab_size()
        byte = _bytes_by_letter()
        pieces = sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
        self._pieces = [bytes(byte[letter] for letter in piece) for piece, _ in pieces]
        self._sizes = np.array([len(piece) for piece in self._pieces])

    @classmethod
    def learn(cls, text: np.ndarray, size: int) -> BPE:
        """Train on a text; the vocabulary has at most `size` pieces."""
        from tokenizers import Tokenizer as LibraryTokenizer
        from tokenizers import decoders, models, pre_tokenizers, trainers

        bytewise = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=bytewise.alphabet(), show_progress=False)
        tokenizer = LibraryTokenizer(models.BPE())
        tokenizer.decoder = decoders.ByteLevel()
        # Training is quadratic in the longest run of letters or of spaces: 24 s for 160 kB of DNA without the cut, 1.3 s with it.
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([bytewise, pre_tokenizers.FixedLength(LONGEST)])
        tokenizer.train_from_iterator(_batches_of_lines(text), trainer)
        tokenizer.pre_tokenizer = bytewise
        return cls(tokenizer)

    def encode(self, text: np.ndarray) -> np.ndarray:
        encoded = chain.from_iterable(map(self._tokenizer.encode_batch_fast, _batches_of_lines(text)))
        return np.fromiter(chain.from_iterable(line.ids for line in encoded), np.min_scalar_type(self.size - 1))

    def sizes(self, text: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        return self._sizes[tokens]

    def save(self) -> str:
        return self._tokenizer.to_str(pretty=True)

    def spell(self, token: int, after: int | None) -> bytes:
        return self._pieces[token]


class Words(Tokenizer):
    """The most frequent words of the training split, or all; <unk> for other words, <eos> for line ends."""

    def __init__(self, vocabulary: Mapping[str, int]):
        self._vocabulary = {word.encode(): token for word, token in vocabulary.items()}
        self._words = sorted(self._vocabulary, key=self._vocabulary.__getitem__)
        self.size = len(self._vocabulary)

    @classmethod
    def learn(cls, text: np.ndarray, size: int | None) -> Words:
        """Take the `size` most frequent words of a text, or all words for None."""
        counts = Counter(_words(text))
        special = [UNKNOWN.encode(), END_OF_LINE.encode()]
        others = sorted((word for word in counts if word not in special), key=lambda word: (-counts[word], word))
        words = special + others[: None if size is None else size - 2]
        return cls({word.decode(): token for token, word in enumerate(words)})

    def encode(self, text: np.ndarray) -> np.ndarray:
        get = self._vocabulary.get
        return np.fromiter((get(word, 0) for word in _words(text)), np.min_scalar_type(self.size - 1))

    def sizes(self, text: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        return np.diff(np.flatnonzero(ends_a_word(text)) + 1, prepend=0)

    def unknown(self, text: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        lengths = (0 if word in self._vocabulary else len(word) for word in _words(text))
        return np.fromiter(lengths, np.int64)

    def save(self) -> str:
        from tokenizers import Regex, models, normalizers, pre_tokenizers
        from tokenizers import Tokenizer as LibraryTokenizer

        words = {word.decode(): token for word, token in self._vocabulary.items()}
        tokenizer = LibraryTokenizer(models.WordLevel(words, unk_token=UNKNOWN))
        tokenizer.normalizer = normalizers.Replace("\n", f" {END_OF_LINE} ")
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[ \t\r\v\f]+"), "removed")
        return tokenizer.to_str(pretty=True)

    def spell(self, token: int, after: int | None) -> bytes:
        """Separate words by one space; <eos> is a line break."""
        word, end = self._words[token], END_OF_LINE.encode()
        if word == end:
            return b"\n"
        return word if after is None or self._words[after] == end else b" " + word


def _bytes_by_letter() -> dict[str, int]:
    """The byte behind each letter of a BPE piece: printable bytes stand for themselves, the others start at letter 256."""
    visible = [byte for byte in range(33, 256) if chr(byte).isprintable()]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + index): byte for index, byte in enumerate(others)}


def _batches_of_lines(text: np.ndarray) -> Iterator[list[str]]:
    """Yield lists of lines, about 1 MiB each; BPE does not merge across line ends."""
    file = io.TextIOWrapper(io.BytesIO(text.data), encoding="utf-8", newline="\n")
    return iter(lambda: file.readlines(1 << 20), [])


def _words(text: np.ndarray) -> Iterator[bytes]:
    """Yield the words in order; the same words as in `ends_a_word`."""
    for line in io.BytesIO(text.data):
        yield from line.split()
        if line.endswith(b"\n"):
            yield END_OF_LINE.encode()
