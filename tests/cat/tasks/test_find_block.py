"""Find the block: blocks and questions read in plain Python."""

import numpy as np
import pytest
from pydantic import ValidationError

from cat.tasks.base import Examples
from cat.tasks.find_block import BOS, QUESTION, SEPARATOR
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


def find_block(**settings):
    return make_task("find_block", **{"block": 5, "question": 3, "alphabet": 11, "answer": "all", **settings})


TASKS = [
    pytest.param(find_block(answer=answer, question=question, alphabet=alphabet), id=f"{answer}-{question}-{alphabet}")
    for answer, question, alphabet in [("all", 3, 11), ("first", 2, 26), ("last", 1, 13), ("last", 5, 6), ("all", 5, 26)]
]


def read(task, tokens):
    """The blocks, the letters of the question, and the letters after it."""
    mark = tokens.index(QUESTION)
    blocks, block = [], []
    for token in tokens[1:mark]:
        if token != SEPARATOR:
            block.append(token)
        elif block:
            blocks.append(block)
            block = []
    assert not block
    rest = tokens[mark + 1 :]
    return blocks, rest[: task.question], rest[task.question :]


def answer_of(task, block):
    return {"all": block, "first": block[:1], "last": block[-1:]}[task.answer]


def solver(task):
    def solve(tokens):
        blocks, letters, _ = read(task, tokens)
        (block,) = (block for block in blocks if set(letters) <= set(block))
        answers = answer_of(task, block)
        return dict(zip(range(len(tokens) - len(answers), len(tokens)), answers, strict=True))

    return solve


@pytest.mark.parametrize("task", TASKS)
def test_exactly_one_block_holds_the_question_and_gives_the_answer(task):
    assert task.lengths == LENGTHS
    assert task.autoregressive == (task.answer == "all")
    check_answers(task, solver(task))
    check_answer_positions(task)


@pytest.mark.parametrize("task", TASKS)
def test_the_sequence_is_full_of_blocks_of_different_letters(task):
    for length in LENGTHS:
        for tokens, targets in rows(draw(task, length, 11)):
            blocks, letters, shown = read(task, tokens)
            assert all(len(set(block)) == len(block) == 5 for block in blocks)
            assert len(set(letters)) == len(letters) == task.question
            assert shown == list(targets.values())[:-1]
            assert tokens[0] == BOS
            assert 0 <= length - (1 + 6 * len(blocks) + 1 + task.question + len(shown)) < 6
            assert len(blocks) == task.blocks_at(length)


def test_every_place_letter_and_order_occurs():
    task = find_block(question=2, answer="first")
    chosen, orders, letters = set(), set(), set()
    for tokens, _ in rows(draw(task, 61, 2003)):
        blocks, asked, _ = read(task, tokens)
        (index,) = (index for index, block in enumerate(blocks) if set(asked) <= set(block))
        chosen.add(index)
        orders.add(tuple(map(blocks[index].index, asked)))
        letters |= set(asked)
    assert chosen == set(range(task.blocks_at(61)))
    assert orders == {(i, j) for i in range(5) for j in range(5) if i != j}
    assert letters == set(range(3, 14))


@pytest.mark.parametrize("answer", ["all", "first", "last"])
@pytest.mark.parametrize(("name", "known"), [("any_block", 0), ("one_letter", 1), ("all_but_one", 2)])
def test_strategies_that_know_some_letters(answer, name, known):
    task = find_block(answer=answer, alphabet=8)

    def guess(tokens, chance):
        blocks, letters, shown = read(task, tokens)
        wanted = set(letters[len(letters) - known :])
        answers = [answer_of(task, block) for block in blocks if wanted <= set(block)]
        return most_frequent([letters[len(shown)] for letters in answers if letters[: len(shown)] == shown], chance)

    check_strategy(task, name, guess)


def test_the_known_letter_is_the_last_of_the_question():
    task = find_block(block=2, question=2, alphabet=3, answer="first", length=13, multiples=(1,))
    inputs = np.array([[BOS, 3, 4, SEPARATOR, 3, 5, SEPARATOR, 5, 4, SEPARATOR, QUESTION, 3, 4]])
    targets = task.oracle(Examples(inputs, inputs))
    assert targets[0, -1] == 3
    assert task.one_letter(Examples(inputs, targets))[0, -1] == 1 / 2, "3 and 5 are the first letters of the blocks with 4"
    assert task.any_block(Examples(inputs, targets))[0, -1] == 1


def test_strategies_that_solve_the_task_are_not_stated():
    assert find_block(question=1).reference_names == ("any_block",)
    assert find_block(question=2).reference_names == ("any_block", "one_letter")
    assert find_block(question=3).reference_names == ("any_block", "one_letter", "all_but_one")


def test_draws():
    check_draws(find_block())
    assert digest(find_block()) == "1feef821e2ff7370"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"question": 6}, "question = 6 has more letters than block = 5"),
        ({"alphabet": 5}, "alphabet = 5 must exceed block = 5, or every block holds every letter"),
        ({"multiples": (0.3, 1)}, "length 18 is too short for two blocks and a question, which need 21 tokens"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(ValidationError) as error:
        find_block(**changes)
    assert str(error.value.errors()[0]["ctx"]["error"]) == message


def test_the_shortest_length_is_valid():
    task = find_block(length=21, multiples=(1,))
    check_answers(task, solver(task))
