"""Recall that stays full at every length, and its optional forms, against a solver in plain Python."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from cat.evaluation.scores import Split, score
from cat.tasks.recall import _different_pair
from cat.theory import construct
from tests.helpers.tasks import (
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

ONE_TOKEN = {"ngram": 1, "keys": 45, "values": 46, "filler": 1, "pairs": 9, "queries": "all", "query_gap": "uniform"}
LONG = {"length": 256, "multiples": (0.5, 1, 4, 16), "key_subset": True}


def recall(**settings):
    return make_task("recall", **{**ONE_TOKEN, **settings})


def two_tokens(**settings):
    return recall(**{"ngram": 2, "keys": 8, "pairs": 8, **settings})


FORMS = [
    pytest.param(recall(distinct_values=True), id="distinct"),
    pytest.param(recall(bos=False), id="no_bos"),
    pytest.param(recall(bos=False, queries="one"), id="no_bos_one"),
    pytest.param(recall(filler="any"), id="any_filler"),
    pytest.param(recall(filler="any", queries="one", query_gap="power"), id="any_filler_one"),
    pytest.param(two_tokens(key_subset=True), id="subset"),
    pytest.param(two_tokens(both_orders=True), id="orders"),
    pytest.param(two_tokens(both_orders=True, key_subset=True, queries="one", distinct_values=True), id="orders_one"),
    pytest.param(recall(ngram=3, keys=5, pairs=6, both_orders=True, key_subset=True, bos=False), id="three"),
]


def read(task, tokens):
    """Runs of key tokens with the token after each, as (key, value, position of the last key token)."""
    found, key = [], ()
    for position, token in enumerate([*tokens, 0]):
        if 1 <= token <= task.keys:
            key += (token,)
        elif key:
            found.append((key, token, position - 1))
            key = ()
    return found


def solver(task):
    def solve(tokens):
        if task.ngram == 1:  # filler may be key tokens, one after the other
            runs = [
                ((token,), [*tokens, 0][position + 1], position)
                for position, token in enumerate(tokens)
                if 1 <= token <= task.keys
            ]
        else:
            runs = read(task, tokens)
        value_of, answers = {}, {}
        for key, value, position in runs:
            if key in value_of:
                answers[position] = value_of[key]
            else:
                value_of[key] = value
        return answers

    return solve


def pairs_of(task, tokens):
    """The key-value pairs of a task with many queries: they come first."""
    slot, first = task.ngram + 1, int(task.bos)
    starts = range(first, first + slot * task.pairs_at(task.length), slot)
    return [(tuple(tokens[start : start + slot - 1]), tokens[start + slot - 1]) for start in starts]


@pytest.mark.parametrize("task", FORMS)
def test_the_answers_are_those_of_a_solver(task):
    check_answers(task, solver(task))
    check_answer_positions(task)
    check_draws(task)


@pytest.mark.parametrize(
    "task",
    [
        pytest.param(recall(length=256, multiples=(0.5, 1, 4, 16), keys=1024, pairs=63), id="1"),
        pytest.param(two_tokens(**LONG, keys=26, pairs=42), id="2"),
        pytest.param(two_tokens(**LONG, keys=27, pairs=42, both_orders=True), id="2_orders"),
        pytest.param(recall(**LONG, ngram=3, keys=8, pairs=30), id="3"),
        pytest.param(recall(**LONG, ngram=3, keys=9, pairs=30, both_orders=True), id="3_orders"),
    ],
)
def test_recall_is_as_full_at_4096_tokens_as_in_training(task):
    assert task.lengths == (128, 256, 1024, 4096)
    assert task.notes() == []
    for length in task.lengths:
        pairs = task.pairs * length // 256
        assert task.pairs_at(length) == (pairs - pairs % 2 if task.both_orders else pairs)
        examples = draw(task, length, 5, "test")
        used = 1 + 2 * task.pairs_at(length) * (task.ngram + 1)
        assert length - used < 0.07 * length + 2 * (task.ngram + 1)
        for tokens, targets in rows(examples):
            assert solver(task)(tokens) == targets
            assert len(targets) == task.pairs_at(length)
            assert sum(token > task.keys + task.values for token in tokens) == task.pairs_at(length) + length - used


def test_a_subset_of_the_keys_keeps_one_token_from_identifying_a_key():
    settings = {"ngram": 2, "keys": 27, "pairs": 42, "length": 256, "multiples": (1,), "values": 512, "distinct_values": True}
    easy, hard = recall(**settings), recall(**settings, key_subset=True)
    examples = {task.key_subset: draw(task, 256, 501) for task in (easy, hard)}
    strategies = {
        name: [getattr(task, name)(examples[task.key_subset]) for task in (easy, hard)] for name in easy.reference_names
    }
    is_target = [examples[subset].targets >= 0 for subset in (False, True)]
    scores = {
        name: [found[mask].mean() for found, mask in zip(pair, is_target, strict=True)] for name, pair in strategies.items()
    }
    assert scores["last_key_token"][0] > 0.45
    assert scores["key_token_set"][0] > 0.9
    assert scores["last_key_token"][1] == pytest.approx(1 / 6, abs=0.02), "7 tokens end 42 keys"
    assert scores["key_token_set"][1] < 0.65
    sizes, used = set(), Counter()
    for tokens, _ in rows(examples[True]):
        letters = {token for token in tokens if 1 <= token <= 27}
        sizes.add(len(letters))
        used.update(letters)
    assert max(sizes) == 7, "the smallest alphabet with 42 2-grams"
    assert set(used) == set(range(1, 28))
    orders = draw(recall(**settings, key_subset=True, both_orders=True), 256)
    assert {len({token for token in tokens if 1 <= token <= 27}) for tokens, _ in rows(orders)} == {7}, "all 42 without (a, a)"


@pytest.mark.parametrize(("ngram", "keys", "pairs"), [(2, 5, 8), (3, 3, 6), (4, 3, 4)])
@pytest.mark.parametrize("distinct", [False, True])
def test_both_orders_of_a_key_have_different_values(ngram, keys, pairs, distinct):
    task = recall(ngram=ngram, keys=keys, pairs=pairs, both_orders=True, multiples=(1,), values=11, distinct_values=distinct)
    task = task.model_copy(update={"training_lengths": (1 + 2 * pairs * (ngram + 1),)})
    seen, adjacent = Counter(), 0
    for tokens, _ in rows(draw(task, task.length, 2003)):
        pairs_found = pairs_of(task, tokens)
        value_of = dict(pairs_found)
        assert len(value_of) == pairs
        for key, value in value_of.items():
            assert key != key[::-1]
            assert value_of[key[::-1]] != value
        seen.update(list(value_of))
        adjacent += pairs_found[0][0][::-1] == pairs_found[1][0]
    assert len(seen) == keys**ngram - keys ** ((ngram + 1) // 2), "all but palindromes"
    assert max(seen.values()) < 1.3 * 2003 * pairs / len(seen)
    assert abs(adjacent / 2003 - 1 / (pairs - 1)) < 5 * np.sqrt(1 / (pairs - 1) / 2003)


def test_the_tokens_of_a_key_without_their_order_find_half_of_the_values():
    task = two_tokens(both_orders=True)
    examples = draw(task, 61)
    assert set(task.key_token_set(examples)[examples.targets >= 0]) == {0.5}


def test_all_values_of_a_sequence_differ():
    task = recall(distinct_values=True)
    for tokens, targets in rows(draw(task, 305, 31)):
        assert len(set(targets.values())) == len(targets) == 45
        assert len(tokens) == 305
    examples = draw(task, 61)
    assert task.guess_value(examples)[examples.targets >= 0] == pytest.approx(1 / 9)


@pytest.mark.parametrize(("length", "pairs"), [(64, 16), (256, 64)])
def test_the_densest_settings_of_zoology_have_no_filler(length, pairs):
    task = recall(
        length=length, pairs=pairs, multiples=(1,), keys=4095, values=4096, filler="any", bos=False, distinct_values=True
    )
    assert task.vocabulary == 8192
    for tokens, targets in rows(draw(task, length, 11)):
        assert len(targets) == pairs
        assert all(
            1 <= key <= 4095 < value for key, value in zip(tokens[: 2 * pairs : 2], tokens[1 : 2 * pairs : 2], strict=True)
        )
        assert list(targets) == list(range(2 * pairs, length, 2))
        assert set(tokens[: 2 * pairs : 2]) == {tokens[position] for position in targets}
    one = recall(length=2 * pairs + 1, pairs=pairs, multiples=(1,), queries="one", keys=4095, bos=False)
    assert draw(one, one.length).inputs.max() <= 4095 + 46
    with pytest.raises(ValidationError, match=f"length {length} is too short for {pairs} pairs"):
        recall(length=length, pairs=pairs, multiples=(1,), keys=4095, values=4096, filler=1)


@pytest.mark.parametrize("queries", ["one", "all"])
def test_any_filler_has_keys_and_values_but_no_second_question(queries):
    task = recall(filler="any", queries=queries)
    assert task.vocabulary == 1 + 45 + 46
    filler = Counter()
    for tokens, targets in rows(draw(task, 61, 501)):
        keys = Counter(token for token in tokens if 1 <= token <= 45)
        asked = {tokens[position] for position in targets}
        assert {token for token, count in keys.items() if count > 1} == asked
        assert all(keys[token] == 2 for token in asked)
        if queries == "all":
            filler.update(token for position, token in enumerate(tokens[19:], 19) if position not in targets)
    if queries == "all":
        assert set(filler) == set(range(1, 92))
        assert 0.25 < sum(filler[token] for token in range(1, 46)) / filler.total() < 0.5, "some key tokens are taken"
        values = np.array([filler[token] for token in range(46, 92)])
        assert abs(values / values.mean() - 1).max() < 0.35


def guess_by(task, clue):
    def guess(tokens, chance):
        key = tuple(tokens[len(tokens) - task.ngram :])
        return most_frequent([value for other, value in pairs_of(task, tokens) if clue(other) == clue(key)], chance)

    return guess


@pytest.mark.parametrize(
    ("name", "clue"),
    [("guess_value", lambda key: ()), ("last_key_token", lambda key: key[-1]), ("key_token_set", sorted)],
)
def test_strategies_in_both_orders_over_a_subset(name, clue):
    task = two_tokens(both_orders=True, key_subset=True, values=5)
    if name != "key_token_set":
        check_strategy(task, name, guess_by(task, clue))
    else:
        examples = draw(task, 61)
        assert set(task.key_token_set(examples)[examples.targets >= 0]) == {0.5}


def test_a_guess_among_any_filler_is_a_value_of_a_pair():
    task = recall(filler="any", values=7)
    check_strategy(task, "guess_value", guess_by(task, lambda key: ()))
    one = recall(filler="any", values=7, queries="one")

    def guess(tokens, chance):
        return most_frequent([value for key, value in pairwise(tokens) if 1 <= key <= 45 < value], chance)

    check_strategy(one, "guess_value", guess)


def test_pairs_are_numbered_without_gaps():
    pairs = [(u, w) for w in range(1, 31) for u in range(w)]
    assert list(zip(*map(np.ndarray.tolist, _different_pair(np.arange(len(pairs)))), strict=True)) == pairs
    larger = 2**30 + np.arange(-3, 4)
    for offset in (0, 1):
        u, w = _different_pair(larger * (larger - 1) // 2 + offset * (larger - 1))
        assert (u == offset * (larger - 1)).all()
        assert (w == larger).all()


def test_the_construction_solves_keys_that_need_their_order():
    task = two_tokens(both_orders=True, key_subset=True, distinct_values=True)
    for length in task.lengths:
        assert score(construct(task), Split.of(*map(torch.from_numpy, draw(task, length, 7)))).accuracy == 1


def test_validation_says_when_longer_tests_have_fillers_for_pairs():
    task = two_tokens(keys=4)
    (note,) = task.notes()
    assert note == (
        "tests of 305 tokens and more have only 16 pairs, as many as there are keys; 68% of 305 tokens is filler."
        " Fix: keys = 7 with key_subset: true, or padded: true for a control"
    )
    assert two_tokens(keys=7).notes() == []
    control = two_tokens(keys=4, padded=True)
    assert control.notes() == []
    assert (task.label, control.label) == ("2-gram recall", "2-gram recall, padded")
    assert all(np.array_equal(*pair) for pair in zip(draw(task, 305), draw(control, 305), strict=True))
    assert "keys = 46, or padded" in recall(keys=44, pairs=9, multiples=(1, 5.11)).notes()[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"key_subset": True}, "key_subset = true needs keys of several tokens, not ngram = 1"),
        ({"both_orders": True}, "both_orders = true needs keys of several tokens, not ngram = 1"),
        ({"ngram": 2, "filler": "any"}, "filler = any needs ngram = 1: with ngram = 2, filler would form keys"),
        ({"ngram": 2, "both_orders": True}, "pairs = 9 must be even, because both_orders = true"),
        ({"ngram": 2, "both_orders": True, "pairs": 8, "values": 1}, "values = 1 must be at least 2, because both_orders = true"),
        (
            {"ngram": 2, "keys": 3, "both_orders": True, "pairs": 8},
            "pairs = 8 exceeds the 6 distinct 2-grams with another reverse over keys = 3",
        ),
        ({"values": 44, "distinct_values": True}, "values = 44 are fewer than the 45 pairs of length 305, which must differ"),
        ({"padded": True}, "padded = true, but every test length has enough keys for as many pairs as training sequences have"),
    ],
)
def test_forms_that_contradict_each_other_are_refused(changes, message):
    with pytest.raises(ValidationError) as error:
        recall(**changes)
    assert str(error.value.errors()[0]["ctx"]["error"]) == message


def test_the_construction_needs_bos():
    with pytest.raises(ValueError, match="needs bos = true"):
        recall(bos=False).check_construction()


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        (recall(filler="any", bos=False, distinct_values=True, query_gap="power"), "963311d636201742"),
        (two_tokens(both_orders=True, key_subset=True), "eb30b5078f120228"),
    ],
)
def test_the_first_examples_are_the_same_on_every_machine(task, expected):
    assert digest(task) == expected
