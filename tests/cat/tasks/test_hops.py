"""Hops along a cycle: edges, separators and queries read in plain Python."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from cat.evaluation.by_part import accuracy_by_part
from cat.evaluation.scores import Split, TokenScores
from cat.tasks.hops import BOS, SEPARATOR
from tests.helpers.tasks import (
    LENGTHS,
    check_answer_positions,
    check_answers,
    check_draws,
    check_strategy,
    digest,
    draw,
    make_task,
    rows,
)


def hops(**settings):
    return make_task("hops", **{"hops": (1, 2, 4), "nodes": 13, "alphabet": 71, **settings})


TASKS = [
    pytest.param(hops(), id="three"),
    pytest.param(hops(hops=(1,), alphabet=65), id="one"),
    pytest.param(hops(hops=(3,), nodes=18, alphabet=91), id="no_successor"),
]


def read(task, tokens):
    """The successor of each node, and the queries as (position, hops, node)."""
    steps = {2 + index: hops for index, hops in enumerate(task.hops)}
    successor, queries, position = {}, [], 1
    while position < len(tokens):
        if tokens[position] in steps:
            queries.append((position + 1, steps[tokens[position]], tokens[position + 1]))
            position += 2
        else:
            assert tokens[position] == SEPARATOR
            if tokens[position + 1] in steps:
                position += 1
            else:
                source, end = tokens[position + 1 : position + 3]
                assert source not in successor
                successor[source] = end
                position += 3
    return successor, queries


def solver(task):
    def solve(tokens):
        successor, queries = read(task, tokens)
        answers = {}
        for position, steps, node in queries:
            for _ in range(steps):
                node = successor[node]
            answers[position] = node
        return answers

    return solve


@pytest.mark.parametrize("task", TASKS)
def test_the_answers_are_those_of_a_solver(task):
    assert task.lengths == LENGTHS
    check_answers(task, solver(task))
    check_answer_positions(task)


@pytest.mark.parametrize("task", TASKS)
def test_the_edges_are_one_cycle_and_the_sequence_is_full(task):
    for length in LENGTHS:
        for tokens, _ in rows(draw(task, length, 11)):
            successor, queries = read(task, tokens)
            node = first = next(iter(successor))
            for _ in range(len(successor) - 1):
                node = successor[node]
                assert node != first
            assert successor[node] == first
            assert len(successor) == task.nodes_at(length) == task.nodes * length // 61
            used = 1 + 3 * len(successor) + 2 * len(queries)
            assert used in (length, length - 1)
            assert tokens[0] == BOS
            assert tokens.count(SEPARATOR) == len(successor) + length - used


def test_nodes_hops_and_orders_are_used_equally():
    task = hops()
    inputs, _ = draw(task, 61, 3001)
    nodes = np.bincount(inputs[inputs >= 5], minlength=task.vocabulary)[5:]
    assert abs(nodes / nodes.mean() - 1).max() < 0.15
    steps = np.bincount(inputs[(inputs >= 2) & (inputs < 5)])[2:]
    assert abs(steps / steps.mean() - 1).max() < 0.05
    ends_first = (inputs[:, 3] == inputs[:, 5]).mean()  # the first edge is followed by the next of the cycle
    assert abs(ends_first - 1 / 12) < 5 * np.sqrt(1 / 12 / 3001)


def other(successor, tokens, known, chance):
    """A node that is none of the first `known` after the query's."""
    excluded = [tokens[-1]]
    for _ in range(known):
        excluded.append(successor[excluded[-1]])
    return chance.choice([node for node in successor if node not in excluded])


@pytest.mark.parametrize(("name", "known"), [("any_node", 0), ("one_hop", 1), ("two_hops", 2)])
def test_strategies_that_follow_some_edges(name, known):
    task = hops(nodes=7, multiples=(1,))

    def guess(tokens, chance):
        successor, queries = read(task, tokens)
        _, steps, node = queries[-1]
        if steps > known:
            return other(successor, tokens, known, chance)
        for _ in range(steps):
            node = successor[node]
        return node

    check_strategy(task, name, guess)


def test_the_direct_successor():
    task = hops()
    check_strategy(task, "successor", lambda tokens, _: read(task, tokens)[0][tokens[-1]])


def test_strategies_that_solve_the_task_are_not_stated():
    assert hops(hops=(1,)).reference_names == ("any_node",)
    assert hops(hops=(2,)).reference_names == ("any_node", "one_hop")
    assert hops(hops=(1, 2)).reference_names == ("any_node", "successor", "one_hop")
    assert hops().reference_names == ("any_node", "successor", "one_hop", "two_hops")


def test_draws():
    check_draws(hops())
    assert digest(hops()) == "772eb48d01f5efa5"


def test_labels():
    assert [hops(hops=steps).label for steps in [(1,), (2,), (1, 2)]] == ["1-hop cycle", "2-hop cycle", "hops along a cycle"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hops": (2, 1)}, "hops = [2, 1] must be ascending, each number once"),
        ({"hops": (1, 6)}, "length 30 has 6 nodes, too few for 6 hops that do not return"),
        ({"alphabet": 64}, "length 305 has 65 nodes, more than alphabet = 64"),
        ({"nodes": 20, "multiples": (1,)}, "length 61 is too short for 20 nodes and a query, which need 63 tokens"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(ValidationError) as error:
        hops(**changes)
    assert str(error.value.errors()[0]["ctx"]["error"]) == message


def test_the_densest_settings_are_valid():
    task = hops(nodes=19, multiples=(1,), alphabet=19, hops=(18,))
    check_answers(task, solver(task))


def test_the_accuracy_of_each_number_of_hops_is_reported():
    """A model that answers every query as if it had one hop is right on just these."""
    task = hops()
    examples = draw(task, task.length)
    parts = task.parts(examples)
    assert [*parts] == [*task.part_names] == ["hops_1", "hops_2", "hops_4"]
    assert np.array_equal(sum(part.astype(int) for part in parts.values()), examples.targets >= 0)
    split = Split.of(*map(torch.tensor, examples))
    right = torch.tensor(task.successor(examples) > 0).gather(1, split.positions.long())
    scores = [TokenScores(torch.zeros(half.shape), half, torch.ones_like(half)) for half in right.split(len(right) // 2 + 1)]
    positions = split.positions.long().numpy()
    assert accuracy_by_part(scores, positions, parts) == {"accuracy_hops_1": 1, "accuracy_hops_2": 0, "accuracy_hops_4": 0}
    assert hops(hops=(1,)).part_names == ()
