"""Frequent tokens, counted in plain Python."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from pydantic import ValidationError

from cat.tasks.frequent import BOS, SEPARATOR
from tests.helpers.tasks import LENGTHS, check_answers, check_draws, check_strategy, digest, draw, make_task, rows


def frequent(**settings):
    return make_task("frequent", **{"top": 3, "alphabet": 11, "margin": 3, **settings})


TASKS = [
    pytest.param(frequent(), id="three"),
    pytest.param(frequent(top=1, alphabet=2, margin=1), id="one"),
    pytest.param(frequent(top=5, alphabet=6, margin=1), id="all_but_one"),
]


def read(tokens):
    """The context, and the tokens after the separator."""
    separator = tokens.index(SEPARATOR)
    return tokens[1:separator], tokens[separator + 1 :]


def solver(task):
    def solve(tokens):
        context, _ = read(tokens)
        common = [token for token, _ in Counter(context).most_common(task.top)]
        return dict(zip(range(len(tokens) - task.top, len(tokens)), common, strict=True))

    return solve


@pytest.mark.parametrize("task", TASKS)
def test_the_answers_are_the_most_frequent_tokens(task):
    assert task.lengths == LENGTHS
    assert task.autoregressive
    check_answers(task, solver(task))


@pytest.mark.parametrize("task", TASKS)
def test_counts_differ_by_the_margin_of_the_length(task):
    for length in LENGTHS:
        margin = max(1, task.margin * length // 61)
        smallest = set()
        for tokens, targets in rows(draw(task, length, 101)):
            context, shown = read(tokens)
            counts = [*Counter(context).values(), *[0] * task.alphabet]
            counts = sorted(counts, reverse=True)[: task.top + 1]
            smallest.add(min(a - b for a, b in pairwise(counts)))
            assert shown == list(targets.values())[:-1]
            assert tokens[0] == BOS
            assert len(context) == length - 1 - task.top
        assert min(smallest) >= margin
        assert margin in smallest or task.top == 1


def test_every_token_is_frequent_and_rare_at_every_position():
    task = frequent()
    inputs, targets = draw(task, 61, 3001)
    context, answers = inputs[:, 1:-3], targets[:, -3:]
    for column in [*context.T[::13], *answers.T]:
        counts = np.bincount(column, minlength=task.vocabulary)[2:]
        assert len(counts) == 11
        assert abs(counts / counts.mean() - 1).max() < 0.4
    assert (context[:, 1:] == context[:, :-1]).mean() < 0.2, "equal tokens are not adjacent more often than by chance"


def test_guesses_in_proportion_to_the_counts():
    def guess(tokens, chance):
        context, shown = read(tokens)
        return chance.choice([token for token in context if token not in shown])

    check_strategy(frequent(), "in_proportion", guess)


def test_the_last_repeated_token():
    def guess(tokens, chance):
        context, shown = read(tokens)
        repeated = [token for token in context if context.count(token) > 1 and token not in shown]
        return repeated[-1] if repeated else None

    check_strategy(frequent(alphabet=30), "last_repeated", guess)


def test_the_frequent_tokens_without_their_order():
    task = frequent()

    def guess(tokens, chance):
        context, shown = read(tokens)
        return chance.choice([token for token, _ in Counter(context).most_common(3) if token not in shown])

    check_strategy(task, "unordered", guess)
    assert frequent(top=1).reference_names == ("in_proportion", "last_repeated")


def test_draws():
    check_draws(frequent())
    assert digest(frequent()) == "b2a078d646aefada"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top": 11}, "top = 11 must be smaller than alphabet = 11"),
        ({"margin": 10, "multiples": (1,)}, "length 61 is too short for top = 3 and this margin, which need 64 tokens"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(ValidationError) as error:
        frequent(**changes)
    assert str(error.value.errors()[0]["ctx"]["error"]) == message


def test_the_largest_margin_is_valid():
    task = frequent(margin=9, multiples=(1,), length=58)
    assert draw(task, 58, 1).inputs.shape == (1, 58)
    check_answers(task, solver(task))
