"""Fuzzy recall: keys and values of several sizes read in plain Python."""

from collections import Counter
from itertools import groupby, product

import pytest
from pydantic import ValidationError

from cat.tasks.fuzzy_recall import BOS
from tests.helpers.tasks import (
    LENGTHS,
    check_answer_positions,
    check_answers,
    check_draws,
    check_strategy,
    digest,
    draw,
    make_task,
    most_frequent,
    rows,
)


def fuzzy_recall(**settings):
    return make_task("fuzzy_recall", **{"keys": 17, "values": 5, "key_size": 3, "value_size": 3, **settings})


TASKS = [
    pytest.param(fuzzy_recall(), id="three"),
    pytest.param(fuzzy_recall(key_size=1, keys=81), id="one_key_token"),
    pytest.param(fuzzy_recall(key_size=2, value_size=1, keys=97, values=3), id="one_value_token"),
    pytest.param(fuzzy_recall(key_size=1, value_size=1, keys=77), id="one_token_each"),
]


def read(task, tokens):
    """Runs of key tokens and of value tokens in turn, as (key, value); the last value may be empty."""
    runs = [tuple(run) for _, run in groupby(tokens[1:], key=lambda token: token > task.keys)]
    return list(zip(runs[::2], [*runs[1::2], ()] if len(runs) % 2 else runs[1::2], strict=True))


def solver(task):
    def solve(tokens):
        answers, value_of, position = {}, {}, 1
        for key, value in read(task, tokens):
            position += len(key)
            if key in value_of:
                answers |= {
                    position - 1 + step: token for step, token in enumerate(value_of[key]) if position - 1 + step < len(tokens)
                }
            else:
                value_of[key] = value
            position += len(value)
        return answers

    return solve


@pytest.mark.parametrize("task", TASKS)
def test_the_answers_are_those_of_a_solver(task):
    assert task.lengths == LENGTHS
    assert not task.autoregressive
    check_answers(task, solver(task))
    check_answer_positions(task)


@pytest.mark.parametrize("task", TASKS)
def test_each_key_occurs_once_and_is_asked_again_with_its_value_until_the_sequence_is_full(task):
    for length in LENGTHS:
        for tokens, _ in rows(draw(task, length, 31)):
            entries, pairs = read(task, tokens), task.pairs_at(length)
            context, asked = entries[:pairs], entries[pairs:]
            value_of = dict(context)
            assert len(value_of) == pairs
            assert tokens[0] == BOS
            assert len({key for key, _ in asked}) == len(asked) > 0
            *complete, (key, value) = asked
            assert all(value_of[key] == value for key, value in complete)
            if BOS in key:  # the part of a key that was cut
                assert set(key) == {BOS}
                assert len(key) < task.key_size
            else:
                assert value_of[key][: len(value)] == value


def test_all_sizes_are_mixed_and_each_token_ends_several_keys():
    task = fuzzy_recall()
    for length in LENGTHS[1:]:
        sizes, ends = Counter(), []
        for tokens, _ in rows(draw(task, length, 31)):
            context = read(task, tokens)[: task.pairs_at(length)]
            sizes.update((len(key), len(value)) for key, value in context)
            last = Counter(key[-1] for key, _ in context)
            ends.append(len(context) / len(last))
        assert set(sizes) == set(product((1, 2, 3), repeat=2)) if length > 100 else len(sizes) > 5
        assert max(sizes.values()) - min(sizes.values()) <= 31
        assert sum(ends) / len(ends) > 1.9


def test_every_key_token_is_used():
    tokens = {token for row, _ in rows(draw(fuzzy_recall(), 61, 301)) for token in row}
    assert tokens == set(range(23))


@pytest.mark.parametrize(("name", "known"), [("any_value", 0), ("last_key_token", 1), ("last_two_key_tokens", 2)])
def test_strategies_that_know_a_part_of_the_key(name, known):
    task = fuzzy_recall()

    def clue(key):
        return key[len(key) - min(known, len(key)) :]

    def guess(tokens, chance):
        entries = read(task, tokens)
        key, begun = entries[-1]
        values = [value for other, value in entries[: task.pairs_at(61)] if clue(other) == clue(key)]
        return most_frequent(
            [value[len(begun)] for value in values if len(value) > len(begun) and value[: len(begun)] == begun], chance
        )

    check_strategy(task, name, guess)


def test_strategies_that_solve_the_task_are_not_stated():
    assert fuzzy_recall(key_size=1, keys=81).reference_names == ("any_value",)
    assert fuzzy_recall(key_size=2, keys=81).reference_names == ("any_value", "last_key_token")
    assert fuzzy_recall().reference_names == ("any_value", "last_key_token", "last_two_key_tokens")


def test_draws():
    check_draws(fuzzy_recall())
    assert digest(fuzzy_recall()) == "bdb95301224cba2e"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keys": 12}, "length 305 has 39 pairs, which need 13 key tokens, more than keys = 12"),
        ({"length": 7, "multiples": (1,)}, "length 7 is too short for 2 pairs and a query, which need 8 tokens"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(ValidationError) as error:
        fuzzy_recall(**changes)
    assert str(error.value.errors()[0]["ctx"]["error"]) == message


@pytest.mark.parametrize("length", [8, 11, *range(13, 40)])
def test_the_end_of_a_sequence_may_cut_a_query_anywhere(length):
    task = fuzzy_recall(length=length, multiples=(1,))
    check_answers(task, solver(task))
