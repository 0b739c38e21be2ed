"""Generation of multi-query associative recall at the sizes of Zoology (arXiv 2312.04927)."""

from __future__ import annotations

from functools import partial

import numpy as np

from benchmarks.measure import Benchmark, Case, Work, compared, same_shapes
from cat.seeding import generator
from cat.tasks.base import IGNORE, Examples
from cat.tasks.recall import BOS, Recall

TARGET = 100


def mqar(vocabulary: int) -> Recall:
    """Return a task with four pairs in 64 tokens; half of the vocabulary are keys and half values."""
    half = vocabulary // 2 - 1
    return Recall(
        kind="recall",
        ngram=1,
        keys=half,
        values=half,
        filler=1,
        pairs=4,
        queries="all",
        query_gap="power",
        length=64,
        multiples=(1,),
        train_examples=1,
        valid_examples=1,
        test_examples=1,
    )


def data(vocabulary: int = 8192, count: int = 8192) -> Benchmark:
    """Compare `Recall.examples` with a loop over examples."""
    case = Case(
        name=f"{count:,} examples of 4 pairs in 64 tokens",
        ours=partial(all_at_once, vocabulary, count),
        other=partial(one_by_one, vocabulary, count),
        sides=("this project", "loop over examples"),
        target=TARGET,
        agree=same_shapes,  # the random numbers differ; tests check both against the oracle
        count=(count, "examples"),
    )
    return Benchmark(
        what=f"Examples of recall, vocabulary {vocabulary:,}, against a loop over examples",
        target=f"{TARGET} times as fast",
        figures=compared(lambda device: [case]),
    )


def all_at_once(vocabulary: int, count: int, device: str) -> Work:
    task, random = mqar(vocabulary), generator(0, "benchmark", "data")
    return lambda: task.examples("train", task.length, count, random)


def one_by_one(vocabulary: int, count: int, device: str) -> Work:
    """Generate one example at a time as Zoology does: keys without replacement, query positions by a power law."""
    task, random = mqar(vocabulary), np.random.RandomState(0)
    keys, values = np.arange(1, 1 + task.keys), np.arange(1 + task.keys, 1 + task.keys + task.values)
    pairs, blank = task.pairs, 1 + task.keys + task.values
    slots = np.arange((task.length - 1) // 2 - pairs)
    weight = (slots + 1.0) ** -0.99

    def example() -> tuple[np.ndarray, np.ndarray]:
        inputs, targets = np.full(task.length, blank), np.full(task.length, IGNORE)
        queries = random.choice(keys, size=pairs, replace=False)
        answers = random.choice(values, size=pairs)
        positions = 1 + 2 * (pairs + random.choice(slots, size=pairs, replace=False, p=weight / weight.sum()))
        inputs[0] = BOS
        inputs[1 : 1 + 2 * pairs : 2], inputs[2 : 2 + 2 * pairs : 2] = queries, answers
        inputs[positions], targets[positions] = queries, answers
        return inputs, targets

    return lambda: Examples(*map(np.stack, zip(*(example() for _ in range(count)), strict=True)))
