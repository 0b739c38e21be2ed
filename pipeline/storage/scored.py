"""checkpoints/<task>/scores/<key>.json: the scores of one model, kept for the next evaluation of the task.

They are no stage output: DVC removes outputs before it runs a stage, and its run cache leaves out stages whose outputs persist.
The key stands for everything that the scores depend on. A file of another key, or a damaged one, is ignored.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipeline.storage.files import atomic_write
from pipeline.storage.paths import CHECKPOINTS
from pipeline.storage.scores import SequenceScores

Rows = list[dict[str, Any]]


class ModelResults(NamedTuple):
    """The rows of one model in the two tables, without the columns that name it, and its scores per sequence."""

    scores: Rows
    filters: Rows
    sequences: dict[int, SequenceScores]
    """By length."""


def read_scored(task: str, key: str) -> ModelResults | None:
    """Read the scores with this key, or None if there are none. They equal the written ones to the bit."""
    try:
        digest, text = _path(task, key).read_text(encoding="utf-8").split("\n", 1)
    except (OSError, ValueError):
        return None
    if digest != _digest(key, text):
        return None
    content = json.loads(text)
    sequences = {
        int(length): SequenceScores(np.array(primary), np.array(weights), None if loss is None else np.array(loss))
        for length, (primary, weights, loss) in content["sequences"].items()
    }
    return ModelResults(content["scores"], content["filters"], sequences)


def write_scored(task: str, key: str, results: ModelResults) -> None:
    sequences = {
        length: [None if column is None else column.tolist() for column in columns]
        for length, columns in results.sequences.items()
    }
    text = json.dumps({**results._asdict(), "sequences": sequences})
    with atomic_write(_path(task, key)) as path:
        path.write_text(f"{_digest(key, text)}\n{text}", encoding="utf-8")


def prune_scored(task: str, kept: Collection[str]) -> None:
    """Remove the scores of a task but those with the keys `kept`."""
    for path in set(_path(task, "").parent.glob("*.json")) - {_path(task, key) for key in kept}:
        path.unlink(missing_ok=True)


def _path(task: str, key: str) -> Path:
    return CHECKPOINTS / task / "scores" / f"{key}.json"


def _digest(key: str, text: str) -> str:
    return hashlib.sha256(f"{key} {text}".encode()).hexdigest()
