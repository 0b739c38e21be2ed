"""Oracles: the target at a position, computed only from the tokens up to it; IGNORE if there is none.

recall     the value after the only earlier occurrence of the last N tokens as a key
copying    the signals before the separator, in order, one per position from the separator on
text       the next token; no oracle knows it at the last position
"""

from collections.abc import Callable

import numpy as np

from cat.tasks.registry import IGNORE, Copying, Recall, Task


def recall(task: Recall, prefix: list[int]) -> int:
    n, values = task.ngram, range(1 + task.keys, 1 + task.keys + task.values)
    starts = [i for i in range(len(prefix) - n) if prefix[i : i + n] == prefix[-n:] and prefix[i + n] in values]
    assert len(starts) <= 1, f"{prefix[-n:]} is a key at {starts}"
    return prefix[starts[0] + n] if starts else IGNORE


def copying(task: Copying, prefix: list[int]) -> int:
    separator = 1
    if separator not in prefix:
        return IGNORE
    end = prefix.index(separator)
    signals = [token for token in prefix[:end] if 2 <= token < 2 + task.alphabet]
    return signals[len(prefix) - 1 - end]


ORACLES: dict[str, Callable[..., int]] = {"recall": recall, "copying": copying}


def answers(task: Task, inputs: np.ndarray) -> np.ndarray:
    """The targets of `inputs`, each computed from the tokens up to its position."""
    oracle = ORACLES[task.kind]
    return np.array([[oracle(task, row[: t + 1]) for t in range(len(row))] for row in inputs.tolist()])


def next_tokens(inputs: np.ndarray) -> np.ndarray:
    """The targets of text at all positions except the last."""
    return inputs[:, 1:].astype(np.int64)
