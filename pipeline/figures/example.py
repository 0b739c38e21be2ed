"""One test sequence, and where a trained variant looks in it."""

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
    """A sequence of L tokens with Q questions."""

    tokens: Integers
    """L."""
    asked: Integers
    """Q: where a question stands."""
    sources: Integers
    """Q: where its answer stands."""


def read_example(task: str) -> Example:
    """The first test sequence of the training length. Raises ValueError where answers stand nowhere in a sequence."""
    data = read_task(task)
    examples = Examples(*(array[:1] for array in read_split(task, f"test_{data.length}")))
    sources = data.answer_positions(examples)
    if sources is None:
        raise ValueError(f"task {task!r}: its answers stand nowhere in its sequences")
    (asked,) = np.nonzero(sources[0] >= 0)
    return Example(examples.inputs[0], asked, sources[0][asked])


def attention_on(task: str, variant: str, seeds: Iterable[int], example: Example) -> NDArray[np.floating[Any]] | None:
    """Q x L: what each question reads, in the layer and head with the most on the answers.

    Of the first seed that has weights, None where every one diverged. Raises ValueError for a variant that does not attend.
    """
    import torch

    from cat.evaluation.diagnostics import attention_maps

    path = next((path for seed in seeds if (path := runs.weights_path(task, variant, seed)).exists()), None)
    if path is None:
        return None
    torch.set_num_threads(1)  # so that the last bits, and with them the figure, do not depend on the machine's cores
    maps = attention_maps(runs.load_model(path), torch.from_numpy(example.tokens).long()[None])
    heads = [head.numpy(force=True)[example.asked] for layer in maps if layer is not None for head in layer[0]]
    if not heads:
        raise ValueError(f"{path}: {variant!r} has no weights of attention")
    return max(heads, key=lambda rows: rows[np.arange(len(rows)), example.sources].mean())
