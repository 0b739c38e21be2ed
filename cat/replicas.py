"""All seeds and learning rates of a cell trained together, as one model with a replica axis: a tiny model does not fill a GPU.

Every tensor has one axis more, in front, over which torch.vmap maps the model: a step is as many operations as a step of one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.overrides import TorchFunctionMode

from cat.configuration import Mamba, ModelConfiguration, Protocol, Schedule
from cat.evaluation import TOKENS_AT_ONCE, Split, autocast
from cat.folding import fold
from cat.model import SequenceModel
from cat.optimizer import BETAS, EPSILON
from cat.tasks.base import IGNORE
from cat.training import Row, Run, _batches, decayed_or_not, mean_loss, rate


def can_be_stacked(config: ModelConfiguration) -> bool:
    """Whether `fit_together` takes models of `config`: all but those that run mamba_ssm's kernel, which vmap does not know."""
    if not isinstance(config, Mamba):
        return True
    from cat.state_space import fused_scan

    return fused_scan("cuda", torch.float32, config.state) is None


def fit_together(
    models: Sequence[SequenceModel],
    train: Split,
    valid: Split,
    *,
    protocol: Protocol,
    schedule: Schedule,
    learning_rates: Sequence[float],
    seeds: Sequence[int],
    stop_early: bool,
    precision: Literal["float32", "bfloat16"] = "float32",
    progress: Callable[[int, int, Row | None], None] = lambda place, step, row: None,
) -> list[Run]:
    """Trains `models`, all of one configuration, in place: each as `fit` does at its learning rate and seed, up to rounding.

    Losses are read where there is a look at the validation split; between looks nothing waits for the device. A replica that
    has ended leaves the stack at the look that finds it out. `progress` is told a place in `models`, and what `fit` tells it.
    """
    stack = Stack(models, learning_rates, protocol=protocol, precision=precision)
    replicas = [
        Replica(model, _batches(len(train.inputs), schedule.batch, seed), partial(progress, place))
        for place, (model, seed) in enumerate(zip(models, seeds, strict=True))
    ]
    running = replicas
    for start in range(0, schedule.steps, protocol.validate_every):
        steps = range(start + 1, min(start + protocol.validate_every, schedule.steps) + 1)
        order = torch.stack([torch.stack([next(replica.batches) for replica in running]) for _ in steps])
        losses = []
        for step, rows in zip(steps, order.to(train.inputs.device), strict=True):
            losses.append(stack.step(_gather(train, rows), rate(step, schedule.steps, protocol.warmup)))
            for replica in running if step < steps[-1] else ():
                replica.progress(step, None)
        seen = zip(running, torch.stack(losses, dim=1).tolist(), stack.score(valid), strict=True)
        for place, (replica, recent, scores) in enumerate(seen):
            replica.look(steps[-1], recent, *scores, protocol=protocol, schedule=schedule, stop_early=stop_early)
            if replica.run is not None:
                stack.unload(place, replica.model)
        going = [place for place, replica in enumerate(running) if replica.run is None]
        if not going:
            break
        if len(going) < len(running):
            stack.keep(going)
            running = [running[place] for place in going]
    return [replica.run for replica in replicas if replica.run is not None]


@dataclass
class Replica:
    """One of the models: where its batches come from, whom it tells, and what has become of it."""

    model: SequenceModel
    batches: Iterator[Tensor]
    progress: Callable[[int, Row | None], None]
    history: list[Row] = field(default_factory=list)
    run: Run | None = None
    """None while it is in the stack."""

    def look(
        self,
        step: int,
        losses: Sequence[float],
        loss: float,
        accuracy: float,
        *,
        protocol: Protocol,
        schedule: Schedule,
        stop_early: bool,
    ) -> None:
        """What `fit` does after `step`, by the losses since the look before, and loss and accuracy on the validation split."""
        finite = [math.isfinite(loss) for loss in losses]
        if not all(finite):
            self._end(step - len(losses) + 1 + finite.index(False), "diverged")
            return
        row = Row(step=step, train_loss=sum(losses) / len(losses), valid_loss=loss, valid_accuracy=accuracy)
        self.history.append(row)
        self.progress(step, row)
        last = self.history[-protocol.stop_after :]
        if stop_early and len(last) == protocol.stop_after and min(r.valid_accuracy for r in last) >= protocol.stop_at:
            self._end(step, "accuracy")
        elif step == schedule.steps:
            self._end(step, "steps")

    def _end(self, steps: int, stop: Literal["accuracy", "steps", "diverged"]) -> None:
        self.run = Run(model=self.model, history=self.history, steps=steps, stop=stop)


class Stack:
    """R models of one configuration: their parameters as a matrix with a row for each, those with weight decay first.

    The state of AdamW (cat/optimizer.py) is two more matrices; what differs between replicas there is a column here.
    """

    def __init__(self, models: Sequence[SequenceModel], learning_rates: Sequence[float], *, protocol: Protocol, precision: str):
        self.protocol, self.precision = protocol, precision
        self.caller = _Caller(models[0])
        names = {id(parameter): name for name, parameter in models[0].named_parameters()}
        decayed, others = decayed_or_not(models[0])
        self.shapes = {names[id(parameter)]: parameter.shape for parameter in (*decayed, *others)}
        self.decayed = sum(parameter.numel() for parameter in decayed)
        self.weights = torch.stack([torch.cat([p.detach().flatten() for p in self._parameters(model)]) for model in models])
        self.mean, self.square = torch.zeros_like(self.weights), torch.zeros_like(self.weights)
        self.peaks = torch.tensor(learning_rates).to(self.weights).view(len(models), 1)
        self.steps = 0
        buffers = [dict(model.named_buffers()) for model in models]
        self.buffers = {name: torch.stack([own[name] for own in buffers]) for name in buffers[0]}

    def step(self, batches: Split, share: float) -> Float[Tensor, " R"]:
        """The losses on batches (R, B, ..), and then a step of AdamW at a share of the peak learning rates."""
        weights = self.weights.detach().requires_grad_()
        losses = self._each(partial(mean_loss, precision=self.precision), weights, batches, mapped=0)
        # A loss depends on its own row alone, so the gradient of their sum is that of each.
        (gradient,) = torch.autograd.grad(losses.sum(), weights)
        self._descend(gradient, share)
        return losses.detach()

    @torch.no_grad()
    def score(self, split: Split) -> list[tuple[float, float]]:
        """Loss and accuracy of each model, as `cat.evaluation.score` has them, and with no more tokens at a time."""
        count, length = split.inputs.shape
        size = max(1, TOKENS_AT_ONCE[split.inputs.device.type] // (length * len(self.weights)))
        marks = partial(_marks, precision=self.precision)
        parts = [
            self._each(marks, self.weights, split.rows(slice(start, start + size)), mapped=None)
            for start in range(0, count, size)
        ]
        asked = (split.answers != IGNORE).sum()
        loss, right = (torch.stack(part).double().sum(0) / asked for part in zip(*parts, strict=True))
        return list(zip(loss.tolist(), right.tolist(), strict=True))

    @torch.no_grad()
    def unload(self, place: int, model: SequenceModel) -> None:
        """Gives `model` the weights of the row at `place`."""
        for parameter, row in zip(self._parameters(model), self._split(self.weights[place]), strict=True):
            parameter.copy_(row)

    def keep(self, places: Sequence[int]) -> None:
        """Leaves the replicas at all other places out from now on."""
        index = torch.tensor(places, device=self.weights.device)
        self.weights, self.mean, self.square, self.peaks = (x[index] for x in (self.weights, self.mean, self.square, self.peaks))
        self.buffers = {name: buffer[index] for name, buffer in self.buffers.items()}

    @torch.no_grad()
    def _descend(self, gradient: Float[Tensor, "R P"], share: float) -> None:
        gradient /= (gradient.norm(dim=1, keepdim=True) / self.protocol.clip).clamp(min=1)
        self.steps += 1
        rates, (first, second) = self.peaks * share, BETAS
        self.mean.lerp_(gradient, 1 - first)
        self.square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        self.weights[:, : self.decayed] *= 1 - rates * self.protocol.weight_decay
        size = (self.square / (1 - second**self.steps)).sqrt_().add_(EPSILON)
        self.weights.addcdiv_(self.mean * rates, size, value=-1 / (1 - first**self.steps))

    def _each(self, function: Callable[..., Any], weights: Float[Tensor, "R P"], batch: Split, *, mapped: int | None) -> Any:
        """`function(model, batch)` of every model; the replicas' batches lie along axis `mapped`, None: they have the same."""

        def call(tensors: dict[str, Tensor], batch: Split) -> Any:
            return functional_call(self.caller, tensors, (function, batch))

        tensors = dict(zip(self.shapes, self._split(weights), strict=True)) | self.buffers
        with _Whole():
            return vmap(call, in_dims=(0, mapped))({f"model.{name}": tensor for name, tensor in tensors.items()}, batch)

    def _split(self, weights: Float[Tensor, "*R P"]) -> list[Tensor]:
        parts = weights.split([shape.numel() for shape in self.shapes.values()], dim=-1)
        return [part.unflatten(-1, shape) for part, shape in zip(parts, self.shapes.values(), strict=True)]

    def _parameters(self, model: SequenceModel) -> list[nn.Parameter]:
        return [model.get_parameter(name) for name in self.shapes]


class _Caller(nn.Module):
    """functional_call calls a module; calling this one is calling a function of the model."""

    def __init__(self, model: SequenceModel):
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., Any], batch: Split) -> Any:
        return function(self.model, batch)


def _gather(split: Split, rows: Int[Tensor, "R B"]) -> Split:
    """The batches of all replicas, (R, B, ..)."""
    return Split(*(tensor.unflatten(0, rows.shape) for tensor in split.rows(rows.flatten())))


def _marks(model: SequenceModel, batch: Split, *, precision: str) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
    """Nats and right answers, added up over a batch."""
    with autocast(batch.inputs.device, precision):
        logits = model.answers(batch.inputs, batch.at).float()
    loss = F.cross_entropy(logits.flatten(0, 1), batch.answers.flatten(), ignore_index=IGNORE, reduction="sum")
    return loss, (logits.argmax(-1) == batch.answers).sum()


class _Whole(TorchFunctionMode):
    """Two operations that vmap takes apart too soon, before autocast has seen them, are called as a whole.

    The parts of attention are kernels that have no rule for vmap on a CPU; on a GPU they have one, under which they do not
    notice that a gradient will be asked for.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            return _attend(*args, **kwargs)
        if function is F.conv1d:
            args = [_cast(x) if isinstance(x, Tensor) else x for x in args]
        return function(*args, **kwargs)


def _attend(q: Tensor, k: Tensor, v: Tensor, *, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
    masks = [] if attn_mask is None else [attn_mask.expand(len(q), -1, -1, -1)]
    return _Folded.apply(partial(F.scaled_dot_product_attention, **options), q, k, v, *masks)


def _cast(x: Tensor) -> Tensor:
    """What autocast does to an operand of a convolution."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


class _Folded(torch.autograd.Function):
    """A function of batches whose sequences do not see each other: those of all replicas are one batch."""

    @staticmethod
    def forward(function: Callable[..., Tensor], *batches: Tensor) -> Tensor:
        raise NotImplementedError("for use under vmap; elsewhere, call the function itself")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing is kept: under vmap, autograd goes through what is called below."""

    @staticmethod
    def vmap(info: Any, mapped: tuple[int | None, ...], function: Callable[..., Tensor], *batches: Tensor) -> tuple[Tensor, int]:
        folded = [fold(x, axis, info.batch_size, into=0) for x, axis in zip(batches, mapped[1:], strict=True)]
        return function(*folded).unflatten(0, (info.batch_size, -1)), 0
