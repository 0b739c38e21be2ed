"""The interface of a task, and the data that it produces."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, Self

import numpy as np
from pydantic import BeforeValidator, ConfigDict, Field, WithJsonSchema, field_serializer, model_validator

from cat.config import Config, ConstructionPlacement, Count

if TYPE_CHECKING:
    from cat.tasks.tokenizer import Tokenizer

IGNORE = -100
"""The target at positions without an answer."""

MAX_CONSTRUCTION_VOCABULARY = 1024
"""Largest vocabulary that a construction supports: its number of weights grows with the square of the vocabulary."""

MIN_LENGTH, MAX_LENGTH = 4, 2**31 - 1
RANGE_LENGTHS = 8
"""Number of training lengths from `from` to `to`. torch.compile keeps at most 8 versions of a function, here one per length."""


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
    """Size of the text that the answers of each of N regions stand for; the same at every length.

    At each length, the windows of a region follow one another, the same number for every region.
    """

    bytes: np.ndarray
    words: np.ndarray
    unknown: np.ndarray
    """Bytes of words outside the vocabulary, which the answers do not determine."""


class Recalled(NamedTuple):
    """Which of the A answers of N regions of the test text can be recalled from the context, N x A."""

    recalled: np.ndarray
    """Whether the n-gram before the answer occurs earlier in the context, followed by the same answer."""
    rare: np.ndarray
    """Whether, in addition, this n-gram with this answer never occurs in the training split."""


class GeneratedData(NamedTuple):
    """The data of a task that its references are scored on."""

    tests: Mapping[int, Examples]
    """The test split of each test length."""
    training: Sequence[Examples | Windows]
    """The training split by length."""
    vocabulary: int
    extents: Extents | None = None
    """None if the task is not text."""
    tokenizer: Tokenizer | None = None
    """None if the task is not text."""


def _list_lengths(value: Any) -> Any:
    """The list that a value of `length` stands for; `{from, to}` is spaced evenly on a logarithmic scale, as multiples are."""
    if isinstance(value, list | tuple) and not value:
        raise ValueError("an empty list has no training length")
    if not isinstance(value, dict):
        return value if isinstance(value, list | tuple) else [value]
    for key in value:
        if key not in ("from", "to"):
            raise ValueError(f"unknown key {key!r}; a range of lengths has the keys from and to")
    for key in ("from", "to"):
        if key not in value:
            raise ValueError(f"a range of lengths needs {key}")
        if type(value[key]) is not int or not MIN_LENGTH <= value[key] <= MAX_LENGTH:
            raise ValueError(f"{key} must be a whole number from {MIN_LENGTH} to {MAX_LENGTH}")
    first, last = value["from"], value["to"]
    if first >= last:
        raise ValueError(f"from = {first} must be smaller than to = {last}")
    steps = RANGE_LENGTHS - 1
    return sorted({round(first * (last / first) ** (step / steps)) for step in range(RANGE_LENGTHS)})


_LENGTH_SCHEMA: dict[str, Any] = {"type": "integer", "minimum": MIN_LENGTH, "maximum": MAX_LENGTH}
_LENGTHS_SCHEMA: dict[str, Any] = {
    "anyOf": [
        _LENGTH_SCHEMA,
        {"type": "array", "items": _LENGTH_SCHEMA, "minItems": 1},
        {
            "type": "object",
            "properties": {"from": _LENGTH_SCHEMA, "to": _LENGTH_SCHEMA},
            "required": ["from", "to"],
            "additionalProperties": False,
        },
    ],
}


class Task(Config):
    """Settings shared by all tasks: the training lengths, the sizes of the splits, and the test lengths."""

    model_config = ConfigDict(serialize_by_alias=True)
    renamed_keys: ClassVar = {"train": "train_examples", "valid": "valid_examples", "test": "test_examples"}
    kind: str
    training_lengths: Annotated[
        tuple[Annotated[int, Field(ge=MIN_LENGTH, le=MAX_LENGTH)], ...],
        Field(alias="length", strict=False),
        BeforeValidator(_list_lengths),
        WithJsonSchema(_LENGTHS_SCHEMA),
    ]
    """Tokens per training sequence, ascending. The key `length` is a number, a list, or `{from, to}` for RANGE_LENGTHS lengths.

    All sequences of a batch have the same length.
    """
    multiples: Annotated[tuple[Annotated[float, Field(gt=0, le=4096)], ...], Field(min_length=1, strict=False)]
    """Lengths of the test splits, as multiples of the training length, ascending; must contain 1."""
    train_examples: Count
    """Training examples; with several training lengths, divided evenly among them."""
    valid_examples: Count
    """Validation examples, of the training length."""
    test_examples: Count
    """Examples per test split; there is one split per multiple."""
    min_test_examples: Count | None = None
    """Tests longer than training have proportionally fewer examples than `test_examples`, but at least these; None: as many."""

    @model_validator(mode="after")
    def _check_training_lengths(self) -> Self:
        if list(self.training_lengths) != sorted(set(self.training_lengths)):
            raise ValueError(f"length = {list(self.training_lengths)} must be ascending, each length once")
        if self.train_examples < (count := len(self.training_lengths)):
            raise ValueError(f"train_examples = {self.train_examples} are too few for {count} training lengths")
        return self

    @model_validator(mode="after")
    def _check_multiples(self) -> Self:
        if 1 not in self.multiples or list(self.multiples) != sorted(set(self.multiples)):
            raise ValueError(f"multiples = {list(self.multiples)} must be ascending and contain 1, the training length")
        if len(set(self.lengths)) < len(self.lengths):
            raise ValueError(f"multiples = {list(self.multiples)} give lengths {list(self.lengths)}, which must differ")
        return self

    @model_validator(mode="after")
    def _check_min_test_examples(self) -> Self:
        if self.min_test_examples is not None and self.min_test_examples > self.test_examples:
            raise ValueError(f"min_test_examples = {self.min_test_examples} exceeds test_examples = {self.test_examples}")
        return self

    @field_serializer("training_lengths")
    def _plain_length(self, lengths: tuple[int, ...]) -> int | tuple[int, ...]:
        return lengths if len(lengths) > 1 else lengths[0]

    @property
    def length(self) -> int:
        """The training length in tokens, the longest if there are several: models are built for it and multiples refer to it."""
        return self.training_lengths[-1]

    @property
    def training_counts(self) -> dict[int, int]:
        """Training examples by length. If they do not divide evenly, the shortest lengths have one more."""
        count, more = divmod(self.train_examples, len(self.training_lengths))
        return {length: count + (index < more) for index, length in enumerate(self.training_lengths)}

    def test_count(self, length: int) -> int:
        """Return the number of test examples of `length` tokens."""
        if self.min_test_examples is None or length <= self.length:
            return self.test_examples
        return max(self.min_test_examples, self.test_examples * self.length // length)

    @property
    def generated_lengths(self) -> tuple[int, ...]:
        """The lengths of all splits, shortest first."""
        return tuple(sorted({*self.training_lengths, *self.lengths}))

    @property
    def lengths(self) -> tuple[int, ...]:
        """The test lengths in tokens, shortest first."""
        return tuple(round(self.length * multiple) for multiple in self.multiples)

    @property
    @abstractmethod
    def vocabulary(self) -> int:
        """Vocabulary size."""

    @property
    def label(self) -> str:
        """The name of the task in figures and tables; by default the name of its file."""
        return self.kind.rpartition(".")[2].replace("_", " ")

    @property
    def autoregressive(self) -> bool:
        """Whether a model is scored on its own continuation instead of with teacher forcing."""
        return False

    @property
    def goal(self) -> Literal["accuracy", "loss"]:
        """The metric that selects models and that figures show."""
        return "accuracy"

    def check_construction(self, placement: ConstructionPlacement | None = None) -> None:
        """Raises ValueError if no construction of cat/theory/ with this placement solves the task; None is the paper's."""
        raise ValueError(f"no construction solves tasks of kind {self.kind}")

    def _check_construction_vocabulary(self) -> None:
        if self.vocabulary > MAX_CONSTRUCTION_VOCABULARY:
            raise ValueError(f"the construction supports a vocabulary of {MAX_CONSTRUCTION_VOCABULARY}, not {self.vocabulary}")

    def answer_positions(self, examples: Examples) -> np.ndarray | None:
        """The position in the context that holds each answer, N x L; -1 at positions without a target.

        None for tasks whose answers are not in the context.
        """
        return None

    def oracle(self, examples: Examples) -> np.ndarray | None:
        """The targets, N x L, computed from the inputs without a model; None if the inputs do not determine them."""
        return None

    @property
    def part_names(self) -> tuple[str, ...]:
        """Parts of the answers whose accuracy is also reported, as the metric `accuracy_<name>`."""
        return ()

    def parts(self, examples: Examples) -> dict[str, np.ndarray]:
        """Name of each part -> N x L, which targets belong to it."""
        return {}

    @property
    def reference_labels(self) -> dict[str, str]:
        """Partial strategies that need no full solution: name -> description in the imperative, on one line.

        Each name is a method `(examples) -> N x L`. It gives the probability that the strategy finds the answer, if it chooses at
        random among equally good candidates. Values at positions without a target do not count.
        """
        return {}

    @property
    def reference_names(self) -> tuple[str, ...]:
        """The names of the partial strategies, weakest first."""
        return tuple(self.reference_labels)

    def score_references(self, data: GeneratedData) -> dict[str, dict[int, float]]:
        """The expected primary metric of each partial strategy: name -> test length -> value."""
        return {
            name: {length: float(getattr(self, name)(split)[split.targets >= 0].mean()) for length, split in data.tests.items()}
            for name in self.reference_names
        }

    def extents(self) -> Extents | None:
        """Size of the text that the answers of the test splits stand for; None if the task is not text."""
        return None

    def overlap(self) -> float | None:
        """Share of the scored bytes that follow a passage of the training text (passages.py); None if the task is not text."""
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

    def training(self, length: int, generator: np.random.Generator) -> Examples | Windows:
        """The training examples of one length: compact examples, or the text and the windows to cut from it."""
        return self.examples("train", length, self.training_counts[length], generator).compact()

    def notes(self) -> list[str]:
        """Return the limits of the data, one line each; `validate` prints them."""
        return []

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


def guess_probability(known: np.ndarray, values: np.ndarray, asked: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """The probability that the most frequent candidate is the answer, for each of A questions.

    A strategy knows a clue about each question. Its candidates are the values with the same clue. The most frequent one is the
    best guess. If k are equally frequent, the strategy chooses each with probability 1 / k.

    `known` and `values` have the clues and values of C candidates, C x D and C; `asked` and `answers` those of A questions. All
    are integers. One column of the clues should be the sequence. Otherwise candidates of other sequences count, too.
    """
    _, clue = np.unique(np.concatenate([known, asked]), axis=0, return_inverse=True)
    clue, base = clue.ravel(), int(max(values.max(), answers.max())) + 1
    pairs, counts = np.unique(clue[: len(known)] * base + values, return_counts=True)
    largest = np.zeros(clue.max() + 1, dtype=np.int64)
    np.maximum.at(largest, pairs // base, counts)
    best = pairs[counts == largest[pairs // base]]
    ties = np.bincount(best // base, minlength=len(largest))
    asked_clue = clue[len(known) :]
    return np.isin(asked_clue * base + answers, best) / np.maximum(ties[asked_clue], 1)
