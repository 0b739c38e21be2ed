"""What a task is, and what it produces."""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, ClassVar, Literal, NamedTuple, Self

import numpy as np
from pydantic import Field, model_validator

from cat.config import Config, Count

IGNORE = -100
"""The target where nothing is asked."""

THEOREM_VOCABULARY = 1024
"""Different tokens up to which the weights of a theorem are built: their number grows as its square."""


class Examples(NamedTuple):
    """`inputs` and `targets`, both N x L: the answer at the position that asks for it, IGNORE elsewhere."""

    inputs: np.ndarray
    targets: np.ndarray

    def compact(self) -> Examples:
        """The same in the smallest integer types that hold them."""
        inputs = self.inputs.astype(np.min_scalar_type(int(self.inputs.max())))
        largest = int(self.targets.max())
        signed = next(t for t in (np.int8, np.int16, np.int32) if largest <= np.iinfo(t).max)
        return Examples(inputs, self.targets.astype(signed))


class Windows(NamedTuple):
    """N examples of `length` tokens cut from one text of T tokens, in which the answer at each token is the next one.

    They are packed: none is padded, they run on across the ends of lines, and they may overlap.
    """

    tokens: np.ndarray
    """T, in the smallest unsigned type that holds them; may be a file that is mapped into memory."""
    starts: np.ndarray
    """N: where each window begins, `length` tokens before the end of the text at the latest."""
    length: int

    def rows(self, index: np.ndarray | slice = slice(None)) -> Examples:
        """Some of the examples, or all."""
        window = np.lib.stride_tricks.sliding_window_view(self.tokens, self.length + 1)[self.starts[index]]
        return Examples(window[:, :-1], window[:, 1:].astype(np.int64))


class Extents(NamedTuple):
    """What the answers of each of N test sequences stand for in a text; the same at every length."""

    bytes: np.ndarray
    words: np.ndarray
    unknown: np.ndarray
    """How many of the bytes the answers do not tell, since they are of words outside the vocabulary."""


class Spans(NamedTuple):
    """What the token after each of the L positions of N test sequences of the longest length stands for in a text, N x L."""

    bytes: np.ndarray
    unknown: np.ndarray


class Recalled(NamedTuple):
    """Which of the A answers of N test sequences can be recalled, N x A."""

    recalled: np.ndarray
    """Whether the tokens right before the answer stood in the context before, with the answer after them."""
    rare: np.ndarray
    """Whether, besides, they never stand before it in the training split."""


class Task(Config):
    """What every task has: the training length, the sizes of its splits, and the lengths of its test splits."""

    renamed_keys: ClassVar = {"train": "train_examples", "valid": "valid_examples", "test": "test_examples"}
    kind: str
    length: Annotated[int, Field(ge=4, lt=2**31)]
    """Tokens of a training sequence."""
    multiples: Annotated[tuple[Annotated[float, Field(gt=0, le=4096)], ...], Field(min_length=1, strict=False)]
    """Lengths of the test splits, as multiples of the training length; 1 is among them."""
    train_examples: Count
    valid_examples: Count
    test_examples: Count
    """Examples in the training, validation, and each test split."""

    @model_validator(mode="after")
    def _one_is_a_multiple(self) -> Self:
        if 1 not in self.multiples or list(self.multiples) != sorted(set(self.multiples)):
            raise ValueError(f"multiples = {list(self.multiples)} must rise and have 1, the training length, among them")
        if len(set(self.lengths)) < len(self.lengths):
            raise ValueError(f"multiples = {list(self.multiples)} give the lengths {list(self.lengths)}, one of them twice")
        return self

    @property
    def lengths(self) -> tuple[int, ...]:
        """The evaluation lengths in tokens, shortest first."""
        return tuple(round(self.length * multiple) for multiple in self.multiples)

    @property
    @abstractmethod
    def vocabulary(self) -> int:
        """How many different tokens there are."""

    @property
    def autoregressive(self) -> bool:
        """Whether a model is scored on its own continuation rather than with the true answers as inputs."""
        return False

    @property
    def goal(self) -> Literal["accuracy", "loss"]:
        """What a model is chosen and drawn by."""
        return "accuracy"

    def check_theorem(self) -> None:
        """Raises ValueError, in words, where no theorem prescribes weights that solve the task (cat/theory.py)."""
        raise ValueError(f"no theorem is about tasks of kind {self.kind}")

    def _check_width(self) -> None:
        if self.vocabulary > THEOREM_VOCABULARY:
            raise ValueError(
                f"the theorem's layer is twice as wide as the vocabulary; it is built up to {THEOREM_VOCABULARY} tokens,"
                f" not {self.vocabulary}"
            )

    def answer_positions(self, examples: Examples) -> np.ndarray | None:
        """Where each answer stands in its sequence, N x L: a position where something is asked, -1 elsewhere.

        None for tasks whose answers stand nowhere.
        """
        return None

    def extents(self) -> Extents | None:
        """The text that the answers of the test splits stand for; None where they are no text."""
        return None

    def spans(self) -> Spans | None:
        """The text that every token of the longest test sequences stands for; None where they are no text."""
        return None

    def recalled(self) -> dict[int, Recalled] | None:
        """Which answers of each test split can be recalled, by its length; None where that is not asked."""
        return None

    def tokenizer(self) -> str | None:
        """What turned text into tokens, as JSON; None where nothing was learnt for that."""
        return None

    def origin(self) -> dict[str, str]:
        """SHA-256 of every local file that the examples are taken from, by its name."""
        return {}

    def training(self, generator: np.random.Generator) -> Examples | Windows:
        """The training split: `examples`, or what they are cut from."""
        return self.examples("train", self.length, self.train_examples, generator).compact()

    @abstractmethod
    def examples(self, split: str, length: int, count: int, generator: np.random.Generator) -> Examples:
        """`count` examples of `length` tokens of the split `train`, `valid` or `test`."""


def draw_distinct(generator: np.random.Generator, rows: int, count: int, population: int) -> np.ndarray:
    """`rows` ordered draws of `count` different numbers below `population`, uniformly: Floyd's algorithm for all rows at once.

    Costs rows * count^2 whatever the population, so that keys can come from a large alphabet.
    """
    chosen = np.empty((rows, count), dtype=np.int64)
    for j, top in enumerate(range(population - count, population)):
        drawn = generator.integers(0, top + 1, size=rows)
        taken = (chosen[:, :j] == drawn[:, None]).any(axis=1)
        chosen[:, j] = np.where(taken, top, drawn)
    return generator.permuted(chosen, axis=1)
