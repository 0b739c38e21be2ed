"""Find the block that holds all letters of a question (the toy task of multi-token attention, arXiv 2504.00927).

A sequence has blocks of different letters, then a question: some letters of one block, in random order. No other block holds all
of them. A separator ends each block.

    BOS  c a e . b f d . d a f .  ?  f a            target f at the last token, with `answer: last`
    BOS  c a e . b f d . d a f .  ?  f a  d a       targets d a f from the last letter of the question on, with `answer: all`

With `answer: all`, a model is scored on its own continuation after the question. If the length leaves tokens over, too few for
a block, they are separators after BOS.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Self

import numpy as np
from pydantic import model_validator

from cat.config import Count
from cat.tasks.base import IGNORE, Examples, Task, draw_distinct, guess_probability

BOS, SEPARATOR, QUESTION = 0, 1, 2
FIRST_LETTER = 3


class FindBlock(Task):
    """Find the block of a question. Longer sequences have more blocks."""

    example: ClassVar = {"block": 3, "question": 2, "alphabet": 7, "answer": "all"}
    kind: Literal["find_block"]
    block: Count
    """Letters per block, all different."""
    question: Count
    """Letters of the question."""
    alphabet: Count
    """Number of distinct letters."""
    answer: Literal["all", "first", "last"]
    """The letters of the block that the model must give: all in order, the first, or the last."""

    @model_validator(mode="after")
    def _check_blocks(self) -> Self:
        if self.question > self.block:
            raise ValueError(f"question = {self.question} has more letters than block = {self.block}")
        if self.alphabet <= self.block:
            raise ValueError(f"alphabet = {self.alphabet} must exceed block = {self.block}, or every block holds every letter")
        for length in self.generated_lengths:
            if self.blocks_at(length) < 2:
                needed = 1 + 2 * (self.block + 1) + self._tail
                raise ValueError(f"length {length} is too short for two blocks and a question, which need {needed} tokens")
        return self

    @property
    def vocabulary(self) -> int:
        return FIRST_LETTER + self.alphabet

    @property
    def autoregressive(self) -> bool:
        return self.answer == "all"

    @property
    def _slots(self) -> tuple[int, ...]:
        """The places in the block of the letters that are the answers."""
        return {"all": tuple(range(self.block)), "first": (0,), "last": (self.block - 1,)}[self.answer]

    @property
    def _tail(self) -> int:
        """Tokens from the question mark on."""
        return 1 + self.question + len(self._slots) - 1

    def blocks_at(self, length: int) -> int:
        """Blocks in sequences of `length` tokens: as many as fit."""
        return (length - 1 - self._tail) // (self.block + 1)

    def examples(self, split: str, length: int, count: int, generator: np.random.Generator) -> Examples:
        """The splits differ only in their generator."""
        number = self.blocks_at(length)
        blocks = draw_distinct(generator, count * number, self.block, self.alphabet).reshape(count, number, self.block)
        rows, chosen = np.arange(count), generator.integers(0, number, size=count)
        letters = np.take_along_axis(blocks[rows, chosen], draw_distinct(generator, count, self.question, self.block), axis=1)
        row, place = np.nonzero(_holds(blocks, letters) & (np.arange(number) != chosen[:, None]))
        while len(row):  # draw every other block that holds the question again
            blocks[row, place] = draw_distinct(generator, len(row), self.block, self.alphabet)
            again = _holds(blocks[row, place][:, None], letters[row])[:, 0]
            row, place = row[again], place[again]

        answers = blocks[rows, chosen][:, self._slots] + FIRST_LETTER
        inputs = np.full((count, length), SEPARATOR, dtype=np.int64)
        inputs[:, 0] = BOS
        inputs[:, self._block_columns(length)] = blocks + FIRST_LETTER
        mark = length - self._tail
        inputs[:, mark] = QUESTION
        inputs[:, mark + 1 : mark + 1 + self.question] = letters + FIRST_LETTER
        inputs[:, mark + 1 + self.question :] = answers[:, :-1]
        targets = np.full((count, length), IGNORE, dtype=np.int64)
        targets[:, -len(self._slots) :] = answers
        return Examples(inputs, targets)

    def answer_positions(self, examples: Examples) -> np.ndarray:
        """At each target position, the position of the letter in its block."""
        blocks, letters = self._parse(examples)
        columns = self._block_columns(examples.inputs.shape[1])
        positions = np.full(examples.inputs.shape, -1)
        positions[:, -len(self._slots) :] = columns[_holds(blocks, letters).argmax(1)][:, self._slots]
        return positions

    def oracle(self, examples: Examples) -> np.ndarray:
        """The letters of the block that holds the question."""
        blocks, letters = self._parse(examples)
        targets = np.full(examples.inputs.shape, IGNORE, dtype=np.int64)
        found = blocks[np.arange(len(blocks)), _holds(blocks, letters).argmax(1)]
        targets[:, -len(self._slots) :] = found[:, self._slots]
        return targets

    @property
    def reference_labels(self) -> dict[str, str]:
        after = ", each letter after right ones" if self.answer == "all" else ""
        labels = {"any_block": f"guess a block{after}"}
        if self.question >= 2:
            labels["one_letter"] = f"guess a block that holds the last letter of the question{after}"
        if self.question >= 3:
            labels["all_but_one"] = f"guess a block that holds all letters of the question but the first{after}"
        return labels

    def any_block(self, examples: Examples) -> np.ndarray:
        """Guess the answer of any block: the most frequent one, because it is right most often."""
        return self._guess(examples, 0)

    def one_letter(self, examples: Examples) -> np.ndarray:
        """Guess among the blocks that hold the last letter of the question."""
        return self._guess(examples, 1)

    def all_but_one(self, examples: Examples) -> np.ndarray:
        """Guess among the blocks that hold all letters of the question but the first."""
        return self._guess(examples, self.question - 1)

    def _guess(self, examples: Examples, known: int) -> np.ndarray:
        """The probability to find each answer, N x L, if candidates are the blocks with the last `known` letters of the question.

        With several answers, candidates must also begin with the answers so far.
        """
        blocks, letters = self._parse(examples)
        candidate = _holds(blocks, letters[:, self.question - known :])
        answers = np.asarray(examples.targets, dtype=np.int64)[:, -len(self._slots) :]
        clues, values, asked = [], [], []
        for step, slot in enumerate(self._slots):
            row, place = np.nonzero(candidate)
            clues.append(np.column_stack([row, np.full(len(row), step)]))
            values.append(blocks[row, place, slot])
            asked.append(np.column_stack([np.arange(len(blocks)), np.full(len(blocks), step)]))
            candidate &= blocks[:, :, slot] == answers[:, step, None]
        found = np.zeros(examples.inputs.shape)
        clue, letter, wanted = (np.concatenate(parts) for parts in (clues, values, asked))
        probability = guess_probability(clue, letter, wanted, answers.T.ravel())
        found[:, -len(self._slots) :] = probability.reshape(len(self._slots), -1).T
        return found

    def _parse(self, examples: Examples) -> tuple[np.ndarray, np.ndarray]:
        """The letters of the blocks, N x blocks x letters, and of the question, N x letters."""
        inputs = np.asarray(examples.inputs, dtype=np.int64)
        mark = inputs.shape[1] - self._tail
        return inputs[:, self._block_columns(inputs.shape[1])], inputs[:, mark + 1 : mark + 1 + self.question]

    def _block_columns(self, length: int) -> np.ndarray:
        """The position of each letter of each block, blocks x letters."""
        number, size = self.blocks_at(length), self.block + 1
        return length - self._tail - (number - np.arange(number)[:, None]) * size + np.arange(self.block)


def _holds(blocks: np.ndarray, letters: np.ndarray) -> np.ndarray:
    """Whether each block holds all letters: N x M from N x M x letters and N x letters."""
    return (blocks[:, :, :, None] == letters[:, None, None, :]).any(axis=2).all(axis=2)
