"""Scores of a model on a split: teacher-forced, or autoregressive on its own continuation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Integer
from torch import Tensor, nn

from cat.model import SequenceModel
from cat.tasks.base import IGNORE
from cat.types import Tokens

TOKENS_AT_ONCE = {"cpu": 1 << 13, "cuda": 1 << 17}
"""Tokens per chunk of an evaluation. Longer sequences run one by one. On a CPU, half of the tokens takes 1.1 (Mamba, delta rule)
to 1.5 times as long (landmark attention), and twice the tokens 0.8 to 1.2 times."""
LOGITS_AT_ONCE = {"cpu": 1 << 22, "cuda": 1 << 31}
"""Logits per chunk, to bound the memory with a large vocabulary: 16 MiB on a CPU, 8 GiB on a GPU."""
Result = TypeVar("Result")


@runtime_checkable
class TrainingSplit(Protocol):
    """Examples of one length on a device, from which batches are drawn."""

    @property
    def size(self) -> int:
        """Number of examples."""

    @property
    def device(self) -> torch.device:
        """Device of the examples."""

    def rows(self, index: Int[Tensor, " B"]) -> Split:
        """Return the examples at `index`, in int64."""


class Split(NamedTuple):
    """Examples as tensors on a device: inputs, target positions and answers."""

    inputs: Integer[Tensor, "N L"]
    positions: Integer[Tensor, "N A"]
    """Rising. A is the largest number of targets in an example; examples with fewer are padded with other positions."""
    answers: Integer[Tensor, "N A"]
    """The targets at `positions`; IGNORE at padding."""

    @classmethod
    def of(cls, inputs: Integer[Tensor, "N L"], targets: Integer[Tensor, "N L"]) -> Split:
        """Build a split. Positions with negative targets are not scored."""
        is_target = targets >= 0
        count = int(is_target.sum(1).max())
        positions = is_target.int().argsort(dim=1, descending=True, stable=True)[:, :count].sort(dim=1).values
        return cls(inputs, positions.int(), targets.masked_fill(~is_target, IGNORE).gather(1, positions))

    @property
    def size(self) -> int:
        return len(self.inputs)

    @property
    def device(self) -> torch.device:
        return self.inputs.device

    def rows(self, index: Int[Tensor, " B"] | slice) -> Split:
        """Return the examples at `index`, in int64."""
        return Split(*(tensor[index].long() for tensor in self))


class TextSplit(NamedTuple):
    """Windows of one text (cat/tasks/base.py), cut on demand. Every position has the next token as its target."""

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
        """Return the windows at `index`, in int64."""
        positions = torch.arange(self.length, device=self.device).repeat(len(index), 1)
        token_index = self.starts[index, None] + positions
        return Split(self.tokens[token_index].long(), positions, self.tokens[token_index + 1].long())


class MixedSplit(NamedTuple):
    """Training examples of several lengths. Each batch is drawn from one of the splits."""

    splits: tuple[TrainingSplit, ...]
    """One per length, shortest first."""


class TokenScores(NamedTuple):
    """Scores of each answer in N sequences."""

    loss: Float[Tensor, "N A"]
    """Nats; 0 at padding."""
    correct: Bool[Tensor, "N A"]
    is_target: Bool[Tensor, "N A"]


class SequenceTotals(NamedTuple):
    """Sums over the answers of each sequence. Scores are quotients of these sums."""

    loss: Float[Tensor, " N"]
    """Nats."""
    correct: Float[Tensor, " N"]
    targets: Float[Tensor, " N"]

    @classmethod
    def of(cls, chunks: Iterable[TokenScores]) -> SequenceTotals:
        """Sum over the answers of each sequence, in float64 on the CPU."""
        sums = ([column.sum(1).double().cpu() for column in chunk] for chunk in chunks)
        return cls(*map(torch.cat, zip(*sums, strict=True)))

    def grouped(self, count: int) -> SequenceTotals:
        """Sum over `count` groups of successive sequences, all of the same size."""
        return SequenceTotals(*(column.view(count, -1).sum(1) for column in self))


class Scores(NamedTuple):
    """Means over a split."""

    loss: float
    """Nats per answer."""
    accuracy: float
    """Share of correct answers."""
    sequence_accuracy: float
    """Share of sequences with every answer correct."""

    @classmethod
    def of(cls, totals: SequenceTotals) -> Scores:
        loss, correct, targets = (column.sum().item() for column in totals)
        return cls(loss / targets, correct / targets, (totals.correct == totals.targets).double().mean().item())

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits(self) -> float:
        """Bits per answer; for text in bytes, bits per byte."""
        return self.loss / math.log(2)


def score(model: SequenceModel, split: Split, *, precision: str = "float32", autoregressive: bool = False) -> Scores:
    """Return the mean scores of `model` on `split`."""
    return Scores.of(sequence_totals(model, split, precision=precision, autoregressive=autoregressive))


def sequence_totals(
    model: SequenceModel, split: Split, *, precision: str = "float32", autoregressive: bool = False
) -> SequenceTotals:
    """Return the scores of `model`, summed over each sequence of `split`."""
    return SequenceTotals.of(token_scores(model, split, precision=precision, autoregressive=autoregressive))


def token_scores(
    model: SequenceModel, split: Split, *, precision: str = "float32", autoregressive: bool = False
) -> Iterator[TokenScores]:
    """Score every answer of `split`, in chunks of bounded size, in the order of its sequences.

    With `autoregressive`, the model's own answers replace the inputs after the first target position. The target positions must
    then be the last ones of the sequence, and the same in every sequence. The loss is still that of the true answers.
    """
    device, logits = split.inputs.device.type, split.positions.shape[1] * model.head.out_features
    size = min(TOKENS_AT_ONCE[device] // split.inputs.shape[1], LOGITS_AT_ONCE[device] // logits)
    return map_chunks(lambda chunk: _token_scores(model, chunk, precision, autoregressive), split, size)


def map_chunks(function: Callable[[Split], Result], split: Split, size: int) -> Iterator[Result]:
    """Apply `function` to chunks of `size` sequences, at least one. Halve the size when memory runs out.

    Raises torch.OutOfMemoryError if one sequence does not fit.
    """
    start, size = 0, max(1, min(size, split.size))
    while start < split.size:
        try:
            result = function(split.rows(slice(start, start + size)))
        except torch.OutOfMemoryError:
            if size == 1:
                raise
            size = -(-size // 2)
        else:
            yield result
            start += size
            continue
        torch.cuda.empty_cache()  # outside `except`: the traceback would keep the tensors alive


@torch.no_grad()
def _token_scores(model: SequenceModel, chunk: Split, precision: str, autoregressive: bool) -> TokenScores:
    inputs, positions, answers = chunk
    with evaluation_mode(model), autocast(inputs.device, precision):
        if autoregressive:
            logits = greedy_logits(model, inputs[:, : int(positions[0, 0]) + 1], positions.shape[1]).float()
        else:
            logits = model.logits_at(inputs, positions).float()
    loss = F.cross_entropy(logits.flatten(0, 1), answers.flatten(), ignore_index=IGNORE, reduction="none")
    return TokenScores(loss.view_as(answers), logits.argmax(-1) == answers, answers != IGNORE)


def greedy_logits(model: SequenceModel, prompt: Tokens, count: int) -> Float[Tensor, "B A V"]:
    """Return the logits of the `count` tokens after each prompt. The most likely token becomes the next input."""
    logits, caches = model.step(prompt)
    steps = [logits]
    while len(steps) < count:
        logits, caches = model.step(logits.argmax(-1)[:, None], caches)
        steps.append(logits)
    return torch.stack(steps, dim=1)


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Disable dropout in `module`."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


def autocast(device: torch.device, precision: str) -> AbstractContextManager[None]:
    """Compute matrix products in bfloat16 if `precision` is "bfloat16". Weights, norms and the loss stay in float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16")
