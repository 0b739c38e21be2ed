"""Read the generated data of a task."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pydantic import TypeAdapter

from cat.tasks.passages import PASSAGE
from cat.tasks.registry import AnyTask, Examples, Task, Windows
from pipeline.storage.files import read_json, readable, sha256
from pipeline.storage.paths import DATA, HELDOUT, PLAN


class Meta(NamedTuple):
    """Description of a task's data for training."""

    vocabulary: int
    training_lengths: tuple[int, ...]
    goal: str
    autoregressive: bool
    digest: str
    """Changes with everything that training reads, including the examples, but not with the test splits."""

    @property
    def length(self) -> int:
        """The training length, the longest if there are several."""
        return self.training_lengths[-1]

    @property
    def mean_length(self) -> float:
        """Mean length of the training sequences: training takes each length equally often."""
        return sum(self.training_lengths) / len(self.training_lengths)


def read_meta(task: str) -> Meta:
    path = DATA / task / "meta.json"
    meta = read_json(path)
    with readable(path, "the description of a task's data"):
        fields = meta["vocabulary"], tuple(meta["training_lengths"]), meta["goal"], meta["autoregressive"]
        return Meta(*fields, digest=hashlib.sha256(path.read_bytes()).hexdigest())


def read_task(task: str) -> Task:
    """Read the task configuration from which the data were generated."""
    path = HELDOUT / task / "meta.json"
    meta = read_json(path)
    with readable(path, "the description of a task's data"):
        return TypeAdapter(AnyTask).validate_python(meta["config"])


def overlap_line(task: str) -> str | None:
    """Say which share of the scored bytes the training text announces; None if the task is not text or not generated yet."""
    path = HELDOUT / task / "meta.json"
    share = read_json(path).get("overlap") if path.exists() else None
    return None if share is None else f"{share:.1%} of the scored bytes follow {PASSAGE} bytes that stand in the training text"


def read_split(task: str, split: str) -> Examples:
    """Read a split other than the training split of a text. Raises ValueError if it is missing or damaged."""
    path = (HELDOUT if split.startswith("test_") else DATA) / task / f"{split}.npz"
    with readable(path, "a split of a task's data"), path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        return Examples(arrays["inputs"], arrays["targets"])


def training_names(lengths: Sequence[int]) -> dict[int, str]:
    """The name of the training split of each length: `train`, or `train_<length>` if there are several."""
    return {length: "train" if len(lengths) == 1 else f"train_{length}" for length in lengths}


def read_training(task: str) -> Iterator[Examples | Windows]:
    """Read the training split of each length, shortest first; the tokens of a text are memory-mapped and shared.

    Raises ValueError as `read_split` does.
    """
    tokens: np.ndarray | None = None
    for name in training_names(read_meta(task).training_lengths).values():
        stored = _read_examples_or_starts(DATA / task / f"{name}.npz")
        if isinstance(stored, Examples):
            yield stored
        else:
            tokens = _map_tokens(task) if tokens is None else tokens
            yield Windows(tokens, *stored)


def _read_examples_or_starts(path: Path) -> Examples | tuple[np.ndarray, int]:
    with readable(path, "a split of a task's data"), path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        if "starts" in arrays:
            return arrays["starts"], int(arrays["length"])
        return Examples(arrays["inputs"], arrays["targets"])


def _map_tokens(task: str) -> np.ndarray:
    meta = read_json(DATA / task / "meta.json")
    path = DATA / task / "tokens.npy"
    with readable(path, "the tokens of a training split"):
        if sha256(path) != meta["tokens"]:
            raise ValueError("its SHA-256 differs from that in meta.json")
        return np.load(path, mmap_mode="r", allow_pickle=False)


def read_code(task: str, variant: str) -> str | None:
    """Read the digest of the code that trains a cell, or None before `plan` has run."""
    path = PLAN / "train" / task / f"{variant}.json"
    return str(read_json(path)["code"]) if path.exists() else None
