"""Checks of synthetic tasks against solvers and strategies in plain Python, which see one sequence at a time."""

import hashlib
import random

import numpy as np

from cat.tasks.registry import IGNORE, KINDS, Examples, generator

SIZES = {"length": 61, "multiples": (0.5, 1, 2, 5), "train_examples": 23, "valid_examples": 11, "test_examples": 7}
LENGTHS = (30, 61, 122, 305)


def make_task(kind, **settings):
    return KINDS[kind](kind=kind, **{**SIZES, **KINDS[kind].example, **settings})


def draw(task, length, count=101, split="train", seed=0):
    return task.examples(split, length, count, generator(seed, "task", f"{split}_{length}"))


def rows(examples):
    """Each sequence with its targets by position, in plain Python."""
    for tokens, targets in zip(examples.inputs.tolist(), examples.targets.tolist(), strict=True):
        yield tokens, {position: target for position, target in enumerate(targets) if target != IGNORE}


def check_answers(task, solve):
    """Compare the targets and the oracle with `solve(tokens)`, which maps positions to answers, on every split."""
    for split, length in [("train", task.length), ("valid", task.length), *(("test", length) for length in task.lengths)]:
        examples = draw(task, length, 31, split)
        assert examples.inputs.shape == examples.targets.shape == (31, length)
        assert 0 <= examples.inputs.min() <= examples.inputs.max() < task.vocabulary
        for tokens, targets in rows(examples):
            assert targets
            assert solve(tokens) == targets
        unanswered = Examples(examples.inputs, np.full_like(examples.targets, IGNORE))
        np.testing.assert_array_equal(task.oracle(unanswered), examples.targets)
        compact = examples.compact()
        np.testing.assert_array_equal(task.oracle(compact), examples.targets)
        for name in task.reference_names:
            np.testing.assert_array_equal(getattr(task, name)(compact), getattr(task, name)(examples))


def check_answer_positions(task):
    """The position of each answer holds the answer, before its target."""
    for length in task.lengths:
        examples = draw(task, length, 31)
        positions, is_target = task.answer_positions(examples), examples.targets != IGNORE
        np.testing.assert_array_equal(positions >= 0, is_target)
        held = np.take_along_axis(examples.inputs, np.maximum(positions, 0), axis=1)
        np.testing.assert_array_equal(held[is_target], examples.targets[is_target])
        assert (positions < np.arange(length))[is_target].all()


def check_strategy(task, name, guess, count=2003):
    """Compare a strategy with `guess(tokens, random)`, one answer to the last of `tokens`: within five standard errors."""
    examples, chance = draw(task, task.length, count), random.Random(5)
    expected = getattr(task, name)(examples)
    assert expected.shape == examples.inputs.shape
    assert expected.min() >= 0
    assert expected.max() <= 1
    hits = []
    for tokens, targets in rows(examples):
        hits.append(np.mean([guess(tokens[: position + 1], chance) == target for position, target in targets.items()]))
    error = np.std(hits) / np.sqrt(count)
    # Weighted by sequence, as `hits` are.
    is_target = examples.targets != IGNORE
    stated = ((expected * is_target).sum(axis=1) / is_target.sum(axis=1)).mean()
    assert 0 < stated < 1
    assert abs(np.mean(hits) - stated) < 5 * error


def check_draws(task):
    """Splits are disjoint, independent of the sizes of others, and never use the global random state."""
    before = random.getstate(), [str(part) for part in np.random.get_state()]
    drawn = {split: draw(task, task.length, 211, split) for split in ("train", "valid", "test")}
    assert (random.getstate(), [str(part) for part in np.random.get_state()]) == before
    assert len({row.tobytes() for examples in drawn.values() for row in examples.inputs}) == 3 * 211
    again = draw(task, task.length, 211, "valid")
    assert all(np.array_equal(*pair) for pair in zip(drawn["valid"], again, strict=True))


def digest(task):
    examples = draw(task, 61, 3)
    return hashlib.sha256(b"".join(array.astype("<i8").tobytes() for array in examples)).hexdigest()[:16]


def most_frequent(candidates, chance):
    """One of the most frequent candidates, at random."""
    largest = max(map(candidates.count, candidates))
    return chance.choice(sorted({candidate for candidate in candidates if candidates.count(candidate) == largest}))
