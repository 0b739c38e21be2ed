"""The oracles: what a task asks at a position, from the tokens up to it alone, or IGNORE where it asks nothing.

recall     the value behind the one earlier place where the last N tokens stand as a key
copying    the signals before the separator, in order, one a position from the separator on
text       the next token; no oracle knows it at the last position
"""

from collections.abc import Callable

import numpy as np

from cat.tasks.registry import IGNORE, Copying, Recall, Task


def recall(task: Recall, seen: list[int]) -> int:
    n, values = task.ngram, range(1 + task.keys, 1 + task.keys + task.values)
    places = [i for i in range(len(seen) - n) if seen[i : i + n] == seen[-n:] and seen[i + n] in values]
    assert len(places) <= 1, f"{seen[-n:]} is a key at {places}"
    return seen[places[0] + n] if places else IGNORE


def copying(task: Copying, seen: list[int]) -> int:
    separator = 1
    if separator not in seen:
        return IGNORE
    end = seen.index(separator)
    signals = [token for token in seen[:end] if 2 <= token < 2 + task.alphabet]
    return signals[len(seen) - 1 - end]


ORACLES: dict[str, Callable[..., int]] = {"recall": recall, "copying": copying}


def answers(task: Task, inputs: np.ndarray) -> np.ndarray:
    """The targets of `inputs`, every one from the tokens up to its own position."""
    oracle = ORACLES[task.kind]
    return np.array([[oracle(task, row[: t + 1]) for t in range(len(row))] for row in inputs.tolist()])


def next_tokens(inputs: np.ndarray) -> np.ndarray:
    """The targets of text, at all positions but the last."""
    return inputs[:, 1:].astype(np.int64)
