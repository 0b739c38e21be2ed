"""One test sequence of recall, and the attention of a trained variant on it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cat.tasks.registry import Examples
from pipeline.storage import runs
from pipeline.storage.task_data import read_split, read_task

Integers = NDArray[np.integer[Any]]


class Example(NamedTuple):
    """A sequence of L tokens with Q queries."""

    tokens: Integers
    """L."""
    query_positions: Integers
    """Q."""
    answer_positions: Integers
    """Q: the position of each query's answer."""


def read_example(task: str) -> Example:
    """Read the first test sequence of the training length. Raises ValueError if the task has no answer positions."""
    data = read_task(task)
    examples = Examples(*(array[:1] for array in read_split(task, f"test_{data.length}")))
    positions = data.answer_positions(examples)
    if positions is None:
        raise ValueError(f"task {task!r}: its answers have no position in its sequences")
    (query_positions,) = np.nonzero(positions[0] >= 0)
    return Example(examples.inputs[0], query_positions, positions[0][query_positions])


def query_attention(task: str, variant: str, seeds: Iterable[int], example: Example) -> NDArray[np.floating[Any]] | None:
    """Q x L: attention of each query, in the layer and head with the most attention on the answers.

    Uses the first seed that has weights; None if every seed diverged. Raises ValueError for a variant without attention.
    """
    import torch

    from cat.evaluation.diagnostics import attention_maps

    path = next((path for seed in seeds if (path := runs.weights_path(task, variant, seed)).exists()), None)
    if path is None:
        return None
    torch.set_num_threads(1)  # the last bits, and with them the figure, would depend on the number of cores
    maps = attention_maps(runs.load_model(path), torch.from_numpy(example.tokens).long()[None])
    heads = [head.numpy(force=True)[example.query_positions] for layer in maps if layer is not None for head in layer[0]]
    if not heads:
        raise ValueError(f"{path}: {variant!r} has no attention")
    return max(heads, key=lambda weights: weights[np.arange(len(weights)), example.answer_positions].mean())
