"""What tasks on the tokens of a text share: its source, its tokenizer, and its splits as tokens."""

from __future__ import annotations

import functools
from typing import Annotated, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from cat.tasks.base import Task
from cat.tasks.corpus import WIKITEXT, WIKITEXT_VALID, digests, read, report
from cat.tasks.tokenizer import BPE, Bytes, Tokenizer, Words

Unit = Literal["bytes", "bpe", "words"]


class EncodedText(Task):
    """A task on the tokens of a text."""

    source: Annotated[str, Field(min_length=1)]
    """`python-docs`, `wikitext-103`, `wikitext-103-valid`, or a path.

    The path is that of a UTF-8 text file or of a folder of `.txt`, `.md` and `.tokens` files.
    """
    folder: Annotated[str, Field(min_length=1)] | None = None
    """The folder with `wiki.train.tokens`, `wiki.valid.tokens` and `wiki.test.tokens`; if None, WikiText-103 is downloaded."""
    tokens: Unit = "bytes"
    """Unit of a token: a byte, a BPE piece trained on the training split, or a word of the training split."""
    vocabulary_size: Annotated[int, Field(ge=3, le=1 << 20)] | None = None
    """Largest vocabulary, for bpe and words; if None, words keeps every word of the training split."""

    @model_validator(mode="after")
    def _check_tokens(self) -> Self:
        if self.folder is not None and not {WIKITEXT, WIKITEXT_VALID}.intersection(self.sources):
            raise ValueError(
                f"folder needs source = {WIKITEXT} or {WIKITEXT_VALID}. Fix: remove folder; source itself may be a path"
            )
        if self.tokens == "bytes" and self.vocabulary_size is not None:
            raise ValueError(f"vocabulary_size = {self.vocabulary_size} needs tokens = bpe or words; there are always 256 bytes")
        if self.tokens == "bpe" and self.vocabulary_size is None:
            raise ValueError("tokens = bpe needs vocabulary_size, the number of bytes plus merges")
        if self.tokens == "bpe" and self.vocabulary_size is not None and self.vocabulary_size <= 256:
            raise ValueError(f"vocabulary_size = {self.vocabulary_size} must exceed 256: bpe starts from 256 bytes")
        return self

    @property
    def sources(self) -> tuple[str, ...]:
        """All texts that the task reads; the tokenizer is trained on the first."""
        return (self.source,)

    def tokenizer(self) -> str | None:
        return tokenizer_of(self).save()

    def report(self) -> list[str]:
        lines = report(self.source)
        if self.tokens == "bpe" and lines:
            lines.append(
                f"{self.source}: learning {self.vocabulary_size:,} BPE pieces takes about a minute per 50 MB of training text"
            )
        return [*lines, *(line for source in self.sources[1:] for line in report(source))]

    def origin(self) -> dict[str, str]:
        return {name: digest for source in self.sources for name, digest in digests(source, self.folder).items()}


def tokenizer_of(task: EncodedText) -> Tokenizer:
    """The tokenizer of a task, trained on its training split. Raises ValueError if that cannot be read."""
    return _learn(task.source, task.folder, task.tokens, task.vocabulary_size)


def tokens_of(task: EncodedText, split: str) -> np.ndarray:
    """The tokens of a split of the task's source. Raises ValueError if it cannot be read."""
    return tokens_of_source(task, task.source, split)


def tokens_of_source(task: EncodedText, source: str, split: str) -> np.ndarray:
    """The tokens of a split of any source, by the tokenizer of the task. Raises ValueError if it cannot be read."""
    return _encode(task.source, task.folder, task.tokens, task.vocabulary_size, source, split)


@functools.cache
def _learn(source: str, folder: str | None, tokens: Unit, vocabulary_size: int | None) -> Tokenizer:
    if tokens == "bytes":
        return Bytes()
    text = read(source, folder, "train")
    if tokens == "words":
        return Words.learn(text, vocabulary_size)
    assert vocabulary_size is not None  # checked by _check_tokens
    return BPE.learn(text, vocabulary_size)


@functools.cache
def _encode(
    learned_from: str, folder: str | None, tokens: Unit, vocabulary_size: int | None, source: str, split: str
) -> np.ndarray:
    return _learn(learned_from, folder, tokens, vocabulary_size).encode(read(source, folder, split))
