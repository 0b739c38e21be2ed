"""Training one model: AdamW, warm-up and cosine, clipping, early stop on the validation split, divergence recorded."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cat.configuration import ModelConfiguration, Protocol, Schedule
from cat.evaluation import Split, autocast, score
from cat.model import SequenceModel
from cat.optimizer import AdamW
from cat.tasks.base import IGNORE


@dataclass(frozen=True, kw_only=True)
class Row:
    """What a look at the validation split saw; `train_loss` is the mean since the look before."""

    step: int
    train_loss: float
    valid_loss: float
    valid_accuracy: float


@dataclass(frozen=True, kw_only=True)
class Run:
    """A trained model, how it got there, and why it stopped."""

    model: SequenceModel
    history: list[Row]
    steps: int
    stop: Literal["accuracy", "steps", "diverged"]
    """`diverged`: the loss of step `steps` was not finite."""


def build_model(config: ModelConfiguration, *, vocabulary: int, length: int, seed: int) -> SequenceModel:
    """A fresh model whose weights depend on (config, vocabulary, length, seed) alone; global random state is untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SequenceModel(config, vocabulary=vocabulary, length=length)


def fit(
    model: SequenceModel,
    train: Split,
    valid: Split,
    *,
    protocol: Protocol,
    schedule: Schedule,
    learning_rate: float,
    seed: int,
    stop_early: bool,
    precision: Literal["float32", "bfloat16"] = "float32",
    progress: Callable[[int, Row | None], None] = lambda step, row: None,
) -> Run:
    """Trains `model` in place, on the device of its weights and splits.

    The order of the batches depends on `seed` and the size of `train` alone. `progress` is told every step, with the row where
    there was a look at the validation split.
    """
    decayed, others = decayed_or_not(model)
    optimizer = AdamW(decayed, others, weight_decay=protocol.weight_decay, clip=protocol.clip)
    batches = _batches(len(train.inputs), schedule.batch, seed)
    history: list[Row] = []
    losses: list[Tensor] = []
    for step in range(1, schedule.steps + 1):
        batch = train.rows(next(batches).to(train.inputs.device))
        loss = mean_loss(model, batch, precision=precision)
        loss.backward()
        optimizer.step(learning_rate * rate(step, schedule.steps, protocol.warmup))
        losses.append(loss.detach())
        if step % protocol.validate_every and step < schedule.steps:
            progress(step, None)
            continue
        recent = torch.stack(losses).tolist()
        losses.clear()
        finite = [math.isfinite(loss) for loss in recent]
        if not all(finite):
            return Run(model=model, history=history, steps=step - len(recent) + 1 + finite.index(False), stop="diverged")
        scores = score(model, valid, precision=precision)
        row = Row(step=step, train_loss=sum(recent) / len(recent), valid_loss=scores.loss, valid_accuracy=scores.accuracy)
        history.append(row)
        progress(step, row)
        last = history[-protocol.stop_after :]
        if stop_early and len(last) == protocol.stop_after and min(r.valid_accuracy for r in last) >= protocol.stop_at:
            return Run(model=model, history=history, steps=step, stop="accuracy")
    return Run(model=model, history=history, steps=schedule.steps, stop="steps")


def rate(step: int, steps: int, warmup: float) -> float:
    """The learning rate of step 1..steps as a share of its peak: a line up to `warmup * steps`, then half a cosine to 0."""
    rise = warmup * steps
    if step <= rise:
        return step / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / (steps - rise)))


def mean_loss(model: SequenceModel, batch: Split, *, precision: str = "float32") -> Tensor:
    """Nats an answer, the mean over a batch."""
    with autocast(batch.inputs.device, precision):
        logits = model.answers(batch.inputs, batch.at).float()
    return F.cross_entropy(logits.flatten(0, 1), batch.answers.flatten(), ignore_index=IGNORE)


def _batches(count: int, size: int, seed: int) -> Iterator[Tensor]:
    """Row numbers of batch after batch, epoch after epoch, each epoch in a new order; a last short batch is left out."""
    generator = torch.Generator().manual_seed(seed)
    size = min(size, count)
    while True:
        order = torch.randperm(count, generator=generator)
        for start in range(0, count - size + 1, size):
            yield order[start : start + size]


def decayed_or_not(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The parameters with weight decay, which are those of linear maps, and the others."""
    matrices = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    matrices -= {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    decayed = [p for p in model.parameters() if id(p) in matrices]
    others = [p for p in model.parameters() if id(p) not in matrices]
    return decayed, others
