"""Scores of a model on a split: with the true tokens as inputs, or on its own continuation."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from cat.model import SequenceModel

TOKENS_AT_ONCE = 1 << 15
"""Bounds the memory of an evaluation; sequences longer than this are taken one by one."""


class Split(NamedTuple):
    """Examples as tensors on a device; a target below zero asks nothing."""

    inputs: Int[Tensor, "N L"]
    targets: Int[Tensor, "N L"]


class Scores(NamedTuple):
    """Means over a split."""

    loss: float
    """Nats an answer."""
    accuracy: float
    """Share of the answers that are right."""
    sequence_accuracy: float
    """Share of the sequences in which every answer is right."""

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits(self) -> float:
        """Bits an answer; for text in bytes, bits per byte."""
        return self.loss / math.log(2)


@torch.no_grad()
def score(model: SequenceModel, split: Split, *, precision: str = "float32", autoregressive: bool = False) -> Scores:
    """Scores `model` on `split`, a bounded number of tokens at a time.

    Autoregressive: from the first asked position on, the model reads what it answered itself; the asked positions must then
    be the same in every sequence, and the last ones of it. The loss stays that of the true answers.
    """
    rows = max(1, TOKENS_AT_ONCE // split.inputs.shape[1])
    loss = right = answers = sequences = 0.0
    for inputs, targets in zip(split.inputs.split(rows), split.targets.split(rows), strict=True):
        inputs, targets = inputs.long(), targets.long()
        asked = targets >= 0
        with autocast(inputs.device, precision):
            if autoregressive:
                inputs = continuation(model, inputs, first=int(asked[0].int().argmax()))
            logits = model.answers(inputs, asked).float()
        loss += F.cross_entropy(logits, targets[asked], reduction="sum").item()
        correct = torch.ones_like(asked)
        correct[asked] = logits.argmax(-1) == targets[asked]
        right += correct[asked].sum().item()
        answers += asked.sum().item()
        sequences += correct.all(1).sum().item()
    return Scores(loss / answers, right / answers, sequences / len(split.inputs))


def continuation(model: SequenceModel, inputs: Int[Tensor, "B L"], *, first: int) -> Int[Tensor, "B L"]:
    """`inputs` with every token after position `first` replaced by the model's own greedy choice."""
    inputs = inputs.clone()
    for position in range(first, inputs.shape[1] - 1):
        hidden = model.hidden(inputs[:, : position + 1])[:, -1]
        inputs[:, position + 1] = model.head(hidden).argmax(-1)
    return inputs


def autocast(device: torch.device, precision: str) -> AbstractContextManager[None]:
    """Matrix products in bfloat16 where `precision` says so; weights, norms and the loss stay in float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16")
