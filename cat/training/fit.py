"""Training one model: AdamW, warm-up and cosine, clipping, early stop on the validation split, divergence recorded.

A run goes on from a `State` as if it had never stopped. A batch for which memory does not suffice is taken in slices, whose
gradients add up to that of the whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cat.config import OptimizerConfig, TrainingConfig
from cat.evaluation.diagnostics import max_logit
from cat.evaluation.scores import Scores, Split, TrainingSplit, autocast, score
from cat.mixers.registry import AnyModel
from cat.model import SequenceModel
from cat.ops.cross_entropy import cross_entropy
from cat.tasks.base import IGNORE
from cat.training.distributed import SINGLE_PROCESS, ProcessGroup
from cat.training.optimizer import AdamW

Stop = Literal["accuracy", "steps", "diverged"]


@dataclass(frozen=True, kw_only=True)
class ValidationRecord:
    """What a look at the validation split saw, and what became of the steps since the look before."""

    step: int
    train_loss: float
    """The mean over these steps, in nats an answer."""
    max_loss: float
    """That of the step where it was largest: a spike stands out above `train_loss`."""
    grad_norm: float
    """The largest of these steps, before it is clipped."""
    valid_loss: float
    valid_accuracy: float
    max_logit: float | None = None
    """Before the softmax, of all layers and heads on the first validation sequences; None where there is no softmax."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A trained model, how it got there, and why it stopped."""

    model: SequenceModel
    history: list[ValidationRecord]
    steps: int
    stop: Stop
    """`diverged`: the loss of step `steps` was not finite."""
    micro_batch: int | None = None
    """Examples of a batch at a time in each process, where the schedule says so or there was no memory for all at once."""


@dataclass(frozen=True, kw_only=True)
class State:
    """A run after `step` steps: what it takes to go on from there to the same bits. Its tensors are copies, on the CPU."""

    step: int
    history: list[ValidationRecord]
    weights: dict[str, Tensor]
    """The `state_dict` of the model."""
    moments: Float[Tensor, "2 P"]
    """Those of AdamW, which lays out the parameters with weight decay first."""
    recent: Float[Tensor, "K 2"]
    """Loss and gradient norm of the steps since the last look at the validation split."""
    micro_batch: int | None = None
    stop: Stop | None = None
    """Why the run has ended, if it has; `step` is then its `steps`."""


def build_model(config: AnyModel, *, vocabulary: int, length: int, seed: int) -> SequenceModel:
    """A fresh model whose weights depend on (config, vocabulary, length, seed) alone; global random state is untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SequenceModel(config, vocabulary=vocabulary, length=length)


def fit(
    model: SequenceModel,
    train: TrainingSplit,
    valid: Split,
    *,
    optimizer_config: OptimizerConfig,
    training_config: TrainingConfig,
    learning_rate: float,
    seed: int,
    stop_early: bool,
    precision: Literal["float32", "bfloat16"] = "float32",
    progress: Callable[[int, ValidationRecord | None], None] = lambda step, row: None,
    resume: State | None = None,
    checkpoint: Callable[[Callable[[], State], bool], None] = lambda state, ended: None,
    group: ProcessGroup = SINGLE_PROCESS,
) -> Run:
    """Trains `model` in place, on the device of its weights and splits.

    The order of the batches depends on `seed` and the size of `train` alone. `progress` is told every step, with the row where
    there was a look at the validation split. `resume` is where the run stood when all other arguments were the same. After
    every step `checkpoint` is given what returns the State there, and whether the run has ended with it; it may raise.

    Every process of `group` calls this with the same arguments but its own device, and comes to the same run. Raises ValueError
    where they are more than the examples of a batch or of `valid`.
    """
    if min(training_config.batch, train.size, valid.size) < group.size:
        raise ValueError(
            f"{group.size} processes are too many for batches of {min(training_config.batch, train.size)} examples"
            f" and {valid.size} to validate on; each must have one"
        )
    decayed, others = split_by_weight_decay(model)
    optimizer = AdamW(decayed, others, weight_decay=optimizer_config.weight_decay, clip=optimizer_config.grad_clip, group=group)
    step, history, recent = 0, list[ValidationRecord](), list[Tensor]()
    micro_batch = training_config.micro_batch
    stop: Stop | None = None
    loss_of = torch.compile(mean_loss) if training_config.compile else mean_loss

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
        optimizer.resume(resume.step, resume.moments)
        recent += resume.recent.to(train.device)
        step, history, micro_batch, stop = resume.step, list(resume.history), resume.micro_batch, resume.stop
    batches = islice(batch_indices(train.size, training_config.batch, seed), step, None)
    while stop is None:
        step, row = step + 1, None
        batch = train.rows(next(batches).to(train.device))
        loss, micro_batch = backward(model, batch, precision=precision, micro_batch=micro_batch, loss_of=loss_of, group=group)
        norm = optimizer.step(learning_rate * lr_scale(step, training_config.steps, optimizer_config.warmup))
        recent.append(torch.stack([loss, norm]))
        if step % optimizer_config.eval_every == 0 or step == training_config.steps:
            losses, norms = torch.stack(recent, dim=1).tolist()
            recent.clear()
            if (bad := diverged(losses)) is not None:
                step, stop = step - len(losses) + 1 + bad, "diverged"
            else:
                scores = _score(model, valid, precision, group)
                row = validation_record(step, losses, norms, scores.loss, scores.accuracy, max_logit(model, valid.inputs))
                history.append(row)
                stop = stop_reason(history, optimizer_config, training_config, stop_early=stop_early)
        if stop != "diverged":
            progress(step, row)
        checkpoint(state, stop is not None)
    return Run(model=model, history=history, steps=step, stop=stop, micro_batch=micro_batch)


def validation_record(
    step: int, losses: Sequence[float], norms: Sequence[float], loss: float, accuracy: float, logit: float | None
) -> ValidationRecord:
    """The row after `step`, by losses and gradient norms since the look before and what the validation split shows."""
    return ValidationRecord(
        step=step,
        train_loss=sum(losses) / len(losses),
        max_loss=max(losses),
        grad_norm=max(norms),
        valid_loss=loss,
        valid_accuracy=accuracy,
        max_logit=logit,
    )


def diverged(losses: Sequence[float]) -> int | None:
    """The place of the first loss that is not finite; None where there is none."""
    return next((place for place, loss in enumerate(losses) if not math.isfinite(loss)), None)


def stop_reason(
    history: Sequence[ValidationRecord], optimizer_config: OptimizerConfig, training_config: TrainingConfig, *, stop_early: bool
) -> Stop | None:
    """Why a run with this history ends after its last row; None where it goes on."""
    last = history[-optimizer_config.early_stop_patience :]
    if (
        stop_early
        and len(last) == optimizer_config.early_stop_patience
        and min(r.valid_accuracy for r in last) >= optimizer_config.early_stop_accuracy
    ):
        return "accuracy"
    return "steps" if history[-1].step == training_config.steps else None


def cpu_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of the model as they are now, on the CPU."""
    return {name: tensor.detach().clone().cpu() for name, tensor in model.state_dict().items()}


def backward(
    model: SequenceModel,
    batch: Split,
    *,
    precision: str = "float32",
    micro_batch: int | None = None,
    loss_of: Callable[..., Tensor] | None = None,
    group: ProcessGroup = SINGLE_PROCESS,
) -> tuple[Float[Tensor, ""], int | None]:
    """The mean loss of a batch, its gradient left with the parameters; and how many examples there was memory for at a time.

    That is `micro_batch`, or half of it until it fits in every process of `group`; None stands for the whole batch. The loss is
    that of the whole batch, the gradient its part that comes from this process's share. `loss_of` is `mean_loss`, or what
    torch.compile makes of it. Raises torch.OutOfMemoryError where one example alone does not fit.
    """
    own = batch.rows(group.local_slice(len(batch.inputs)))
    asked = None if group.size == 1 else (batch.answers != IGNORE).sum()
    while True:
        loss, size = None, micro_batch or len(own.inputs)
        try:
            loss = _backward(model, own, precision, micro_batch, asked, loss_of or mean_loss)
        except torch.OutOfMemoryError:
            if size == 1:
                raise
        # Here the error is gone, and with it the tensors that its traceback held.
        if not group.all_reduce_max(int(loss is None)):
            assert loss is not None
            return group.all_reduce_sum(loss), micro_batch
        micro_batch = -(-group.all_reduce_max(size) // 2)
        model.zero_grad()
        torch.cuda.empty_cache()


def _backward(
    model: SequenceModel,
    batch: Split,
    precision: str,
    micro_batch: int | None,
    asked: Tensor | None,
    loss_of: Callable[..., Tensor],
) -> Float[Tensor, ""]:
    if micro_batch is None and asked is None:
        loss = loss_of(model, batch, precision=precision)
        loss.backward()
        return loss.detach()
    asked, losses = (batch.answers != IGNORE).sum() if asked is None else asked, []
    size = micro_batch or len(batch.inputs)
    for start in range(0, len(batch.inputs), size):
        loss = loss_of(model, batch.rows(slice(start, start + size)), precision=precision, asked=asked)
        loss.backward()
        losses.append(loss.detach())
    return torch.stack(losses).sum()


def _score(model: SequenceModel, valid: Split, precision: str, group: ProcessGroup) -> Scores:
    """The scores of `model`, of which every process finds out its share."""
    own = Split(*(tensor[group.local_slice(valid.size)] for tensor in valid))
    scores = score(model, own, precision=precision)
    if group.size == 1:
        return scores
    asked = int((own.answers != IGNORE).sum())
    weights = torch.tensor([asked, asked, own.size], dtype=torch.float64)
    sums, counts = group.all_reduce_sum(torch.stack([weights * torch.tensor(scores, dtype=torch.float64), weights]))
    return Scores(*(sums / counts).tolist())


def lr_scale(step: int, steps: int, warmup: float) -> float:
    """The learning rate of step 1..steps as a share of its peak: a line up to `warmup * steps`, then half a cosine to 0."""
    rise = warmup * steps
    if step <= rise:
        return step / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / (steps - rise)))


def mean_loss(model: SequenceModel, batch: Split, *, precision: str = "float32", asked: Tensor | None = None) -> Tensor:
    """Nats an answer, the mean over a batch; for a slice of one in which `asked` answers are asked, its share in that mean."""
    with autocast(batch.inputs.device, precision):
        logits = model.logits_at(batch.inputs, batch.positions).float()
    logits, answers = logits.flatten(0, 1), batch.answers.flatten()
    return cross_entropy(logits, answers) / ((answers != IGNORE).sum() if asked is None else asked)


def batch_indices(count: int, size: int, seed: int) -> Iterator[Tensor]:
    """Row numbers of batch after batch, epoch after epoch, each epoch in a new order; a last short batch is left out."""
    generator = torch.Generator().manual_seed(seed)
    size = min(size, count)
    while True:
        order = torch.randperm(count, generator=generator)
        for start in range(0, count - size + 1, size):
            yield order[start : start + size]


def split_by_weight_decay(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The parameters with weight decay, which are those of linear maps, and the others."""
    matrices = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    matrices -= {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    decayed = [p for p in model.parameters() if id(p) in matrices]
    others = [p for p in model.parameters() if id(p) not in matrices]
    return decayed, others
