"""Generating recall with many questions at the sizes of Zoology (arXiv 2312.04927)."""

from __future__ import annotations

from functools import partial

import numpy as np

from benchmarks.measure import Benchmark, Case, Work, compared, same_shapes
from cat.seeding import generator
from cat.tasks.base import IGNORE, Examples
from cat.tasks.recall import BOS, Recall

TARGET = 100


def mqar(vocabulary: int) -> Recall:
    """Four pairs in 64 tokens, half of the vocabulary keys and half of it values."""
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
    """`Recall.examples` against a loop over examples."""
    case = Case(
        name=f"{count:,} examples of 4 pairs in 64 tokens",
        ours=partial(all_at_once, vocabulary, count),
        other=partial(one_by_one, vocabulary, count),
        sides=("this project", "loop over examples"),
        target=TARGET,
        agree=same_shapes,  # other random numbers; the tests hold both to the oracle
        count=(count, "examples"),
    )
    return Benchmark(
        what=f"Examples of recall, vocabulary {vocabulary:,}, against drawing one after the other",
        target=f"{TARGET} times as fast",
        figures=compared(lambda device: [case]),
    )


def all_at_once(vocabulary: int, count: int, device: str) -> Work:
    task, random = mqar(vocabulary), generator(0, "benchmark", "data")
    return lambda: task.examples("train", task.length, count, random)


def one_by_one(vocabulary: int, count: int, device: str) -> Work:
    """Keys without replacement, the places of the questions by the power law, an example at a time, as Zoology draws them."""
    task, random = mqar(vocabulary), np.random.RandomState(0)
    keys, values = np.arange(1, 1 + task.keys), np.arange(1 + task.keys, 1 + task.keys + task.values)
    pairs, blank = task.pairs, 1 + task.keys + task.values
    slots = np.arange((task.length - 1) // 2 - pairs)
    weight = (slots + 1.0) ** -0.99

    def example() -> tuple[np.ndarray, np.ndarray]:
        inputs, targets = np.full(task.length, blank), np.full(task.length, IGNORE)
        asked = random.choice(keys, size=pairs, replace=False)
        answers = random.choice(values, size=pairs)
        places = 1 + 2 * (pairs + random.choice(slots, size=pairs, replace=False, p=weight / weight.sum()))
        inputs[0] = BOS
        inputs[1 : 1 + 2 * pairs : 2], inputs[2 : 2 + 2 * pairs : 2] = asked, answers
        inputs[places], targets[places] = asked, answers
        return inputs, targets

    return lambda: Examples(*map(np.stack, zip(*(example() for _ in range(count)), strict=True)))
