"""Train one model: AdamW, linear warm-up, cosine decay, gradient clipping, early stopping on the validation split.

A run resumes from a `State` to the same bits. A batch that does not fit in memory is split into micro-batches, whose gradients
add up to the gradient of the batch. If the training examples have several lengths, each batch has one of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cat.config import ModelConfig, TrainingConfig
from cat.evaluation.diagnostics import max_logit
from cat.evaluation.scores import MixedSplit, Scores, Split, TrainingSplit, autocast, score
from cat.model import SequenceModel
from cat.ops.cross_entropy import cross_entropy
from cat.seeding import derive_seed
from cat.tasks.base import IGNORE
from cat.training.distributed import SINGLE_PROCESS, ProcessGroup
from cat.training.optimizer import AdamW

Stop = Literal["accuracy", "steps", "diverged"]


@dataclass(frozen=True, kw_only=True)
class ValidationRecord:
    """Validation metrics, and training metrics since the previous validation."""

    step: int
    train_loss: float
    """Mean over these steps, in nats per answer."""
    max_loss: float
    """Largest loss of a step. A loss spike exceeds `train_loss`."""
    grad_norm: float
    """Largest gradient norm of a step, before clipping."""
    valid_loss: float
    valid_accuracy: float
    max_logit: float | None = None
    """Largest attention logit over all layers and heads, on the first validation sequences; None if there is no softmax."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A trained model, its history, and why training stopped."""

    model: SequenceModel
    history: list[ValidationRecord]
    steps: int
    stop: Stop
    """`diverged`: the loss of step `steps` was not finite."""
    micro_batch: int | None = None
    """Examples per micro-batch in each process; None if every batch was computed at once."""


@dataclass(frozen=True, kw_only=True)
class State:
    """Everything needed to resume a run after `step` steps to the same bits. Its tensors are copies on the CPU."""

    step: int
    history: list[ValidationRecord]
    weights: dict[str, Tensor]
    """The `state_dict` of the model."""
    moments: Float[Tensor, "2 P"]
    """Moments of AdamW, parameters with weight decay first."""
    recent: Float[Tensor, "K 2"]
    """Loss and gradient norm of the steps since the last validation."""
    micro_batch: int | None = None
    stop: Stop | None = None
    """Why the run ended, if it did; `step` is then its number of steps."""


def build_model(config: ModelConfig, *, vocabulary: int, length: int, seed: int) -> SequenceModel:
    """Build a model whose weights depend only on the arguments. The global random state does not change."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SequenceModel(config, vocabulary=vocabulary, length=length)


def fit(
    model: SequenceModel,
    train: TrainingSplit | MixedSplit,
    valid: Split,
    *,
    config: TrainingConfig,
    learning_rate: float,
    seed: int,
    stop_early: bool,
    precision: Literal["float32", "bfloat16"] = "float32",
    progress: Callable[[int, ValidationRecord | None], None] = lambda step, record: None,
    resume: State | None = None,
    checkpoint: Callable[[Callable[[], State], bool], None] = lambda state, ended: None,
    group: ProcessGroup = SINGLE_PROCESS,
) -> Run:
    """Train `model` in place, on the device of its weights and splits.

    The order of the batches depends only on `seed` and the sizes of `train`. What is dropped depends only on `seed`, the step and
    the size of `group`. `progress` is called after every step, with the validation record if there is one. `resume` is a state of
    a run with the same arguments. `checkpoint` is called after every step with a function that returns the state and with whether
    the run ended; it may raise.

    Every process of `group` calls this with the same arguments, except for its own device, and returns the same run. Raises
    ValueError if `group` has more processes than a batch or `valid` has examples.
    """
    splits = train.splits if isinstance(train, MixedSplit) else (train,)
    sizes = [split.size for split in splits]
    if min(config.batch, *sizes, valid.size) < group.size:
        raise ValueError(
            f"{group.size} processes are too many for batches of {min(config.batch, *sizes)} examples"
            f" and {valid.size} validation examples: each process needs at least one"
        )
    decayed, others = split_by_weight_decay(model)
    optimizer = AdamW(decayed, others, weight_decay=config.weight_decay, grad_clip=config.grad_clip, group=group)
    step, history, recent = 0, list[ValidationRecord](), list[Tensor]()
    micro_batch = config.micro_batch
    stop: Stop | None = None
    loss_function = torch.compile(mean_loss) if config.compile else mean_loss

    def state() -> State:
        return State(
            step=step,
            history=list(history),
            weights=cpu_state_dict(model),
            moments=optimizer.moments.cpu(),
            recent=torch.stack(recent).cpu() if recent else torch.empty(0, 2),
            micro_batch=micro_batch,
            stop=stop,
        )

    if resume is not None:
        model.load_state_dict(resume.weights)
        if resume.stop is None:  # a run that has ended needs no optimizer
            optimizer.resume(resume.step, resume.moments)
        recent += resume.recent.to(valid.device)
        step, history, micro_batch, stop = resume.step, list(resume.history), resume.micro_batch, resume.stop
    batches = islice(draw_batches(sizes, config.batch, seed), step, None)
    while stop is None:
        step, record = step + 1, None
        index, rows = next(batches)
        batch = splits[index].rows(rows.to(valid.device))
        with _seeded_dropout(model, seed, step, group):
            loss, micro_batch = backward(
                model, batch, precision=precision, micro_batch=micro_batch, loss_function=loss_function, group=group
            )
        grad_norm = optimizer.step(learning_rate * lr_scale(step, config.steps, config.warmup))
        recent.append(torch.stack([loss, grad_norm]))
        if step % config.eval_every == 0 or step == config.steps:
            losses, grad_norms = torch.stack(recent, dim=1).tolist()
            recent.clear()
            if (diverged_at := first_non_finite(losses)) is not None:
                step, stop = step - len(losses) + 1 + diverged_at, "diverged"
            else:
                scores = _score(model, valid, precision, group)
                record = validation_record(step, losses, grad_norms, scores.loss, scores.accuracy, max_logit(model, valid.inputs))
                history.append(record)
                stop = stop_reason(history, config, stop_early=stop_early)
        if stop != "diverged":
            progress(step, record)
        checkpoint(state, stop is not None)
    return Run(model=model, history=history, steps=step, stop=stop, micro_batch=micro_batch)


def validation_record(
    step: int, losses: Sequence[float], grad_norms: Sequence[float], loss: float, accuracy: float, logit: float | None
) -> ValidationRecord:
    """Build the record after `step`.

    `losses` and `grad_norms` are those of the steps since the previous validation. `loss`, `accuracy` and `logit` are validation
    metrics.
    """
    return ValidationRecord(
        step=step,
        train_loss=sum(losses) / len(losses),
        max_loss=max(losses),
        grad_norm=max(grad_norms),
        valid_loss=loss,
        valid_accuracy=accuracy,
        max_logit=logit,
    )


def first_non_finite(losses: Sequence[float]) -> int | None:
    """Return the index of the first loss that is not finite; None if all are finite."""
    return next((index for index, loss in enumerate(losses) if not math.isfinite(loss)), None)


def stop_reason(history: Sequence[ValidationRecord], config: TrainingConfig, *, stop_early: bool) -> Stop | None:
    """Return why the run ends after the last record of `history`; None if it continues."""
    patience = config.early_stop_patience
    accuracies = [record.valid_accuracy for record in history[-patience:]]
    if stop_early and len(accuracies) == patience and min(accuracies) >= config.early_stop_accuracy:
        return "accuracy"
    return "steps" if history[-1].step == config.steps else None


def cpu_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Copy the state of the model to the CPU."""
    return {name: tensor.detach().clone().cpu() for name, tensor in model.state_dict().items()}


def backward(
    model: SequenceModel,
    batch: Split,
    *,
    precision: str = "float32",
    micro_batch: int | None = None,
    loss_function: Callable[..., Tensor] | None = None,
    group: ProcessGroup = SINGLE_PROCESS,
) -> tuple[Float[Tensor, ""], int | None]:
    """Compute the mean loss of a batch and its gradient. Return the loss and the micro-batch size that fits in memory.

    `micro_batch` is halved until it fits in every process of `group`; None stands for the whole batch. The loss is that of the
    whole batch. The gradient is this process's part of the gradient of the batch. `loss_function` is `mean_loss`, or its
    compiled version.

    Raises torch.OutOfMemoryError if one example does not fit.
    """
    local_batch = batch.rows(group.local_slice(len(batch.inputs)))
    targets = None if group.size == 1 else (batch.answers != IGNORE).sum()
    while True:
        loss, size = None, micro_batch or len(local_batch.inputs)
        try:
            loss = _backward(model, local_batch, precision, micro_batch, targets, loss_function or mean_loss)
        except torch.OutOfMemoryError:
            if size == 1:
                raise
        # Outside `except`: the traceback would keep the tensors alive.
        if not group.all_reduce_max(int(loss is None)):
            assert loss is not None
            return group.all_reduce_sum(loss), micro_batch
        micro_batch = -(-group.all_reduce_max(size) // 2)
        model.zero_grad()
        torch.cuda.empty_cache()


@contextmanager
def _seeded_dropout(model: SequenceModel, seed: int, step: int, group: ProcessGroup) -> Iterator[None]:
    """Seed the dropout of a step, so that a resumed run repeats it. The global random state does not change."""
    if not model.config.differs_in_training:
        yield
        return
    device = model.head.weight.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(derive_seed(seed, f"step {step}", f"dropout {group.rank}"))
        yield


def _backward(
    model: SequenceModel,
    batch: Split,
    precision: str,
    micro_batch: int | None,
    targets: Tensor | None,
    loss_function: Callable[..., Tensor],
) -> Float[Tensor, ""]:
    if micro_batch is None and targets is None:
        loss = loss_function(model, batch, precision=precision)
        loss.backward()
        return loss.detach()
    targets, losses = (batch.answers != IGNORE).sum() if targets is None else targets, []
    size = micro_batch or len(batch.inputs)
    for start in range(0, len(batch.inputs), size):
        loss = loss_function(model, batch.rows(slice(start, start + size)), precision=precision, targets=targets)
        loss.backward()
        losses.append(loss.detach())
    return torch.stack(losses).sum()


def _score(model: SequenceModel, valid: Split, precision: str, group: ProcessGroup) -> Scores:
    """Score `model`. Each process scores its slice of `valid`; all processes return the scores of all of `valid`."""
    local_split = Split(*(tensor[group.local_slice(valid.size)] for tensor in valid))
    scores = score(model, local_split, precision=precision)
    if group.size == 1:
        return scores
    targets = int((local_split.answers != IGNORE).sum())
    weights = torch.tensor([targets, targets, local_split.size], dtype=torch.float64)
    sums, counts = group.all_reduce_sum(torch.stack([weights * torch.tensor(scores, dtype=torch.float64), weights]))
    return Scores(*(sums / counts).tolist())


def lr_scale(step: int, steps: int, warmup: float) -> float:
    """Return the learning rate of step 1..steps, relative to its peak.

    Linear warm-up over `warmup * steps` steps, then cosine decay to 0.
    """
    warmup_steps = warmup * steps
    if step <= warmup_steps:
        return step / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / (steps - warmup_steps)))


def mean_loss(model: SequenceModel, batch: Split, *, precision: str = "float32", targets: Tensor | None = None) -> Tensor:
    """Return the mean loss over a batch, in nats per answer.

    `targets` is the number of answers of the whole batch if `batch` is a slice. The losses of the slices then add up to the mean.
    """
    with autocast(batch.inputs.device, precision):
        logits = model.logits_at(batch.inputs, batch.positions).float()
    logits, answers = logits.flatten(0, 1), batch.answers.flatten()
    return cross_entropy(logits, answers) / ((answers != IGNORE).sum() if targets is None else targets)


def draw_batches(counts: Sequence[int], size: int, seed: int) -> Iterator[tuple[int, Tensor]]:
    """Yield a split and the indices of its examples for each batch without end.

    `counts` are the examples of each split. In each round, every split has one batch, in a new order. Each split has its own
    epochs. A single split has the batches of `batch_indices`.
    """
    batches = [batch_indices(count, size, seed + index) for index, count in enumerate(counts)]
    for split in batch_indices(len(counts), 1, seed + len(counts)):
        index = int(split)
        yield index, next(batches[index])


def batch_indices(count: int, size: int, seed: int) -> Iterator[Tensor]:
    """Yield the indices of each batch without end: a new order per epoch, without a last incomplete batch."""
    generator = torch.Generator().manual_seed(seed)
    size = min(size, count)
    while True:
        order = torch.randperm(count, generator=generator)
        for start in range(0, count - size + 1, size):
            yield order[start : start + size]


def split_by_weight_decay(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return the parameters with weight decay and the others. Decayed: weights of linear maps, unless tied to an embedding."""
    matrices = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    matrices -= {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    decayed = [p for p in model.parameters() if id(p) in matrices]
    others = [p for p in model.parameters() if id(p) not in matrices]
    return decayed, others
