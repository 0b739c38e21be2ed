"""scores/<task>.npz: scores per test sequence, small enough for git.

For each test length:

    <length>/runs       `variant/seed` of each run
    <length>/correct    correct answers, shape (runs, sequences)
    <length>/answers    all answers, shape (sequences,)
    <length>/loss       nats per answer, shape (runs, sequences), rounded to 4 bits of mantissa; not for autoregressive tasks

A text has `bits` per byte and `bytes` instead of these counts. Verdicts need only the spread of these numbers: the values
themselves are in results/, with full precision. The same scores give the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.storage.files import atomic_write, readable
from pipeline.storage.tables import read_arrays

Floats = NDArray[np.floating[Any]]
LOSS_BITS = 4
"""Bits of mantissa that a loss keeps, an error of at most 3 %: half the size of float16, and the spread stays the same."""
_ARRAYS = {"accuracy": ("correct", "answers"), "loss": ("loss", "answers"), "bits_per_byte": ("bits", "bytes")}
"""Metric -> the array with its values, and the one with their weights."""


class SequenceScores(NamedTuple):
    """One run at one length, each of shape (sequences,)."""

    primary: Floats
    """Correct answers; for a text bits per byte."""
    weights: Floats
    """Answers; for a text bytes."""
    loss: Floats | None
    """Nats per answer; None for texts and autoregressive tasks."""


def write_scores(path: Path, scores: Mapping[tuple[str, int, int], SequenceScores], *, text: bool) -> None:
    """Write the scores by (variant, seed, length)."""
    arrays: dict[str, NDArray[Any]] = {}
    for length in sorted({length for _, _, length in scores}):
        of_length = {f"{variant}/{seed}": row for (variant, seed, at), row in scores.items() if at == length}
        rows = [*of_length.values()]
        primary, weights = np.stack([row.primary for row in rows]), rows[0].weights
        arrays[f"{length}/runs"] = np.array([*of_length])
        arrays[f"{length}/{'bytes' if text else 'answers'}"] = _small(weights)
        arrays[f"{length}/{'bits' if text else 'correct'}"] = primary.astype(np.float16) if text else _small(primary)
        if (losses := [row.loss for row in rows if row.loss is not None]) and not text:
            arrays[f"{length}/loss"] = _rounded(np.stack(losses))
    with atomic_write(path) as part, part.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)


def read_scores(path: Path) -> dict[str, dict[tuple[str, int, int], NDArray[np.float64]]]:
    """Read {metric: {(variant, seed, length): two rows}}: sums over each sequence, and what they are divided by.

    Raises ValueError if the file is no file of scores.
    """
    arrays = read_arrays(path)
    scores: dict[str, dict[tuple[str, int, int], NDArray[np.float64]]] = {}
    with readable(path, "a file of scores"):
        for name in [name for name in arrays if name.endswith("/runs")]:
            length = name.partition("/")[0]
            for metric, (key, size) in _ARRAYS.items():
                if f"{length}/{key}" not in arrays:
                    continue
                rows, weights = arrays[f"{length}/{key}"].astype(float), arrays[f"{length}/{size}"].astype(float)
                for run, row in zip(arrays[name], rows, strict=True):
                    variant, _, seed = str(run).partition("/")
                    sums = row if metric == "accuracy" else row * weights
                    scores.setdefault(metric, {})[variant, int(seed), int(length)] = np.stack([sums, weights])
    return scores


def _small(counts: Floats) -> NDArray[Any]:
    """Counts in the smallest integer type."""
    return counts.astype(np.min_scalar_type(int(counts.max())))


def _rounded(losses: Floats) -> NDArray[np.float16]:
    drop = 10 - LOSS_BITS  # float16 has 10 bits of mantissa
    bits = losses.clip(max=2.0**15).astype(np.float16).view(np.uint16)
    return ((bits + (1 << (drop - 1))) & np.uint16(0xFFFF << drop & 0xFFFF)).astype(np.uint16).view(np.float16)
