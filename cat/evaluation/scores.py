"""Scores of a model on a split: with the true tokens as inputs, or on its own continuation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Integer
from torch import Tensor

from cat.model import SequenceModel
from cat.tasks.base import IGNORE
from cat.types import Tokens

TOKENS_AT_ONCE = {"cpu": 1 << 12, "cuda": 1 << 17}
"""Bounds the memory of an evaluation, on a CPU to what a core's cache holds; sequences longer than this are taken one by one."""
Part = TypeVar("Part")


@runtime_checkable
class TrainingSplit(Protocol):
    """Examples on a device, of which batches are made."""

    @property
    def size(self) -> int:
        """How many there are."""

    @property
    def device(self) -> torch.device:
        """Where they are."""

    def rows(self, index: Int[Tensor, " B"]) -> Split:
        """Some of the examples, as 64-bit numbers."""


class Split(NamedTuple):
    """Examples as tensors on a device: what is read, where an answer is asked, and which."""

    inputs: Integer[Tensor, "N L"]
    positions: Integer[Tensor, "N A"]
    """Positions in rising order, as many for every example as the one with most questions has."""
    answers: Integer[Tensor, "N A"]
    """IGNORE where an example has fewer questions."""

    @classmethod
    def of(cls, inputs: Integer[Tensor, "N L"], targets: Integer[Tensor, "N L"]) -> Split:
        """A split of examples whose targets are below zero where nothing is asked."""
        asked = targets >= 0
        most = int(asked.sum(1).max())
        at = asked.int().argsort(dim=1, descending=True, stable=True)[:, :most].sort(dim=1).values
        return cls(inputs, at.int(), targets.masked_fill(~asked, IGNORE).gather(1, at))

    @property
    def size(self) -> int:
        return len(self.inputs)

    @property
    def device(self) -> torch.device:
        return self.inputs.device

    def rows(self, index: Int[Tensor, " B"] | slice) -> Split:
        """Some of the examples, as 64-bit numbers."""
        return Split(*(tensor[index].long() for tensor in self))


class TextSplit(NamedTuple):
    """Windows of one text (cat/tasks/base.py): each is cut when its turn comes, and asks for the next token everywhere."""

    tokens: Integer[Tensor, " T"]
    starts: Int[Tensor, " N"]
    length: int

    @property
    def size(self) -> int:
        return len(self.starts)

    @property
    def device(self) -> torch.device:
        return self.tokens.device

    def rows(self, index: Int[Tensor, " B"]) -> Split:
        """Some of the examples, as 64-bit numbers."""
        places = torch.arange(self.length, device=self.device).repeat(len(index), 1)
        at = self.starts[index, None] + places
        return Split(self.tokens[at].long(), places, self.tokens[at + 1].long())


class TokenScores(NamedTuple):
    """What a model answered in N sequences, answer by answer."""

    loss: Float[Tensor, "N A"]
    """Nats; 0 where nothing is asked."""
    correct: Bool[Tensor, "N A"]
    is_target: Bool[Tensor, "N A"]


class SequenceTotals(NamedTuple):
    """What a model answered, sequence by sequence: the sums that scores are quotients of."""

    loss: Float[Tensor, " N"]
    """Nats."""
    correct: Float[Tensor, " N"]
    targets: Float[Tensor, " N"]

    @classmethod
    def of(cls, parts: Iterable[TokenScores]) -> SequenceTotals:
        """The sums over the answers of each sequence, in float64, on the CPU."""
        sums = ([column.sum(1).double().cpu() for column in part] for part in parts)
        return cls(*map(torch.cat, zip(*sums, strict=True)))


class Scores(NamedTuple):
    """Means over a split."""

    loss: float
    """Nats an answer."""
    accuracy: float
    """Share of the answers that are right."""
    sequence_accuracy: float
    """Share of the sequences in which every answer is right."""

    @classmethod
    def of(cls, tally: SequenceTotals) -> Scores:
        loss, right, asked = (column.sum().item() for column in tally)
        return cls(loss / asked, right / asked, (tally.correct == tally.targets).double().mean().item())

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits(self) -> float:
        """Bits an answer; for text in bytes, bits per byte."""
        return self.loss / math.log(2)


def score(model: SequenceModel, split: Split, *, precision: str = "float32", autoregressive: bool = False) -> Scores:
    """The scores of `model` on `split`: those of its `tally`."""
    return Scores.of(sequence_totals(model, split, precision=precision, autoregressive=autoregressive))


def sequence_totals(
    model: SequenceModel, split: Split, *, precision: str = "float32", autoregressive: bool = False
) -> SequenceTotals:
    """What `model` answers in each sequence of `split`: the sums of its `outcomes`."""
    return SequenceTotals.of(token_scores(model, split, precision=precision, autoregressive=autoregressive))


def token_scores(
    model: SequenceModel, split: Split, *, precision: str = "float32", autoregressive: bool = False
) -> Iterator[TokenScores]:
    """What `model` answers in `split`, a bounded number of tokens at a time, in the order of its sequences.

    Autoregressive: after the first asked position the model reads what it answers itself; the asked positions must then be the
    same in every sequence, and the last ones of it. The loss stays that of the true answers.
    """
    size = TOKENS_AT_ONCE[split.inputs.device.type] // split.inputs.shape[1]
    return in_parts(lambda part: _token_scores(model, part, precision, autoregressive), split, size)


def in_parts(function: Callable[[Split], Part], split: Split, size: int) -> Iterator[Part]:
    """`function` of `size` sequences of `split` at a time, one at least, or of half as many where there is no memory for them.

    Raises torch.OutOfMemoryError where there is none for one.
    """
    start, size = 0, max(1, min(size, split.size))
    while start < split.size:
        try:
            part = function(split.rows(slice(start, start + size)))
        except torch.OutOfMemoryError:
            if size == 1:
                raise
            size = -(-size // 2)
        else:
            yield part
            start += size
            continue
        torch.cuda.empty_cache()  # here the error is gone, and with it the tensors that its traceback held


@torch.no_grad()
def _token_scores(model: SequenceModel, split: Split, precision: str, autoregressive: bool) -> TokenScores:
    """Of all sequences at once."""
    inputs, at, answers = split
    with autocast(inputs.device, precision):
        if autoregressive:
            logits = greedy_logits(model, inputs[:, : int(at[0, 0]) + 1], at.shape[1]).float()
        else:
            logits = model.logits_at(inputs, at).float()
    loss = F.cross_entropy(logits.flatten(0, 1), answers.flatten(), ignore_index=IGNORE, reduction="none")
    return TokenScores(loss.view_as(answers), logits.argmax(-1) == answers, answers != IGNORE)


def greedy_logits(model: SequenceModel, prompt: Tokens, count: int) -> Float[Tensor, "B A V"]:
    """The logits of the `count` tokens after each prompt, of which the model reads those that it holds most likely itself."""
    logits, caches = model.step(prompt)
    every = [logits]
    while len(every) < count:
        logits, caches = model.step(logits.argmax(-1)[:, None], caches)
        every.append(logits)
    return torch.stack(every, dim=1)


def autocast(device: torch.device, precision: str) -> AbstractContextManager[None]:
    """Matrix products in bfloat16 where `precision` says so; weights, norms and the loss stay in float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16")
