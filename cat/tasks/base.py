"""The interface of a task, and the data that it produces."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, NamedTuple, Self

import numpy as np
from pydantic import Field, model_validator

from cat.config import Config, Count

IGNORE = -100
"""The target at positions without an answer."""

MAX_CONSTRUCTION_VOCABULARY = 1024
"""Largest vocabulary that a construction supports: its number of weights grows with the square of the vocabulary."""


class Examples(NamedTuple):
    """`inputs` and `targets`, both N x L: the answer at each target position, IGNORE elsewhere."""

    inputs: np.ndarray
    targets: np.ndarray

    def compact(self) -> Examples:
        """Convert both to the smallest integer types that hold their values."""
        inputs = self.inputs.astype(np.min_scalar_type(int(self.inputs.max())))
        largest = int(self.targets.max())
        target_type = next(t for t in (np.int8, np.int16, np.int32) if largest <= np.iinfo(t).max)
        return Examples(inputs, self.targets.astype(target_type))


class Windows(NamedTuple):
    """N examples of `length` tokens cut from one text of T tokens; the target at each position is the next token.

    Windows are packed: they have no padding, cross line ends and may overlap.
    """

    tokens: np.ndarray
    """Shape T, in the smallest unsigned type that holds them; may be a memory-mapped file."""
    starts: np.ndarray
    """Shape N: the start of each window, at most T - 1 - length, so that the last token has a target."""
    length: int

    def rows(self, index: np.ndarray | slice = slice(None)) -> Examples:
        """Cut the windows at `index`."""
        window = np.lib.stride_tricks.sliding_window_view(self.tokens, self.length + 1)[self.starts[index]]
        return Examples(window[:, :-1], window[:, 1:].astype(np.int64))


class Extents(NamedTuple):
    """Size of the text that the answers of each of N test sequences stand for; the same at every length."""

    bytes: np.ndarray
    words: np.ndarray
    unknown: np.ndarray
    """Bytes of words outside the vocabulary, which the answers do not determine."""


class Spans(NamedTuple):
    """Size of the text that the token after each position stands for, N x L; L is the longest test length."""

    bytes: np.ndarray
    unknown: np.ndarray


class Recalled(NamedTuple):
    """Which of the A answers of N test sequences can be recalled from the context, N x A."""

    recalled: np.ndarray
    """Whether the n-gram before the answer occurs earlier in the context, followed by the same answer."""
    rare: np.ndarray
    """Whether, in addition, this n-gram with this answer never occurs in the training split."""


class Task(Config):
    """Settings shared by all tasks: the training length, the sizes of the splits, and the test lengths."""

    renamed_keys: ClassVar = {"train": "train_examples", "valid": "valid_examples", "test": "test_examples"}
    kind: str
    length: Annotated[int, Field(ge=4, lt=2**31)]
    """Tokens per training sequence."""
    multiples: Annotated[tuple[Annotated[float, Field(gt=0, le=4096)], ...], Field(min_length=1, strict=False)]
    """Lengths of the test splits, as multiples of the training length, ascending; must contain 1."""
    train_examples: Count
    valid_examples: Count
    test_examples: Count
    """Examples per test split; there is one split per multiple."""

    @model_validator(mode="after")
    def _check_multiples(self) -> Self:
        if 1 not in self.multiples or list(self.multiples) != sorted(set(self.multiples)):
            raise ValueError(f"multiples = {list(self.multiples)} must be ascending and contain 1, the training length")
        if len(set(self.lengths)) < len(self.lengths):
            raise ValueError(f"multiples = {list(self.multiples)} give lengths {list(self.lengths)}, which must differ")
        return self

    @property
    def lengths(self) -> tuple[int, ...]:
        """The test lengths in tokens, shortest first."""
        return tuple(round(self.length * multiple) for multiple in self.multiples)

    @property
    @abstractmethod
    def vocabulary(self) -> int:
        """Vocabulary size."""

    @property
    def autoregressive(self) -> bool:
        """Whether a model is scored on its own continuation instead of with teacher forcing."""
        return False

    @property
    def goal(self) -> Literal["accuracy", "loss"]:
        """The metric that selects models and that figures show."""
        return "accuracy"

    @property
    def reference_names(self) -> tuple[str, ...]:
        """Shortcuts whose score figures can show as a reference line, such as that of guessing."""
        return ()

    @property
    def reference_labels(self) -> Mapping[str, str]:
        """Name -> words of each reference."""
        return {}

    def check_construction(self) -> None:
        """Raises ValueError if no construction of cat/theory.py solves the task."""
        raise ValueError(f"no construction solves tasks of kind {self.kind}")

    def _check_construction_vocabulary(self) -> None:
        if self.vocabulary > MAX_CONSTRUCTION_VOCABULARY:
            raise ValueError(f"the construction supports a vocabulary of {MAX_CONSTRUCTION_VOCABULARY}, not {self.vocabulary}")

    def answer_positions(self, examples: Examples) -> np.ndarray | None:
        """The position in the context that holds each answer, N x L; -1 at positions without a target.

        None for tasks whose answers are not in the context.
        """
        return None

    def extents(self) -> Extents | None:
        """Size of the text that the answers of the test splits stand for; None if the task is not text."""
        return None

    def spans(self) -> Spans | None:
        """Size of the text behind every token of the longest test sequences; None if the task is not text."""
        return None

    def recalled(self) -> dict[int, Recalled] | None:
        """By test length: which answers can be recalled from the context; None if the task does not define this."""
        return None

    def tokenizer(self) -> str | None:
        """The trained tokenizer as JSON; None if there is none."""
        return None

    def origin(self) -> dict[str, str]:
        """SHA-256 of each local source file, by name."""
        return {}

    def report(self) -> list[str]:
        """Say in one line each how local source files are split and which are skipped. Raises ValueError if they are unusable."""
        return []

    def training(self, generator: np.random.Generator) -> Examples | Windows:
        """The training split: compact examples, or the text and the windows to cut from it."""
        return self.examples("train", self.length, self.train_examples, generator).compact()

    @abstractmethod
    def examples(self, split: str, length: int, count: int, generator: np.random.Generator) -> Examples:
        """Draw `count` examples of `length` tokens for the split `train`, `valid` or `test`."""


def draw_distinct(generator: np.random.Generator, rows: int, count: int, population: int) -> np.ndarray:
    """Draw `count` distinct integers below `population` for each row, uniformly and in random order.

    Floyd's algorithm on all rows at once. The cost, rows * count^2, does not depend on the population, so alphabets can be large.
    """
    chosen = np.empty((rows, count), dtype=np.int64)
    for j, top in enumerate(range(population - count, population)):
        drawn = generator.integers(0, top + 1, size=rows)
        taken = (chosen[:, :j] == drawn[:, None]).any(axis=1)
        chosen[:, j] = np.where(taken, top, drawn)
    return generator.permuted(chosen, axis=1)
