"""All seeds and learning rates of a cell trained together, as one model with a replica axis: a tiny model does not fill a GPU.

Every tensor has one axis more, in front, over which torch.vmap maps the model: a step is as many operations as a step of one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call, vmap
from torch.overrides import TorchFunctionMode

from cat.config import OptimizerConfig, TrainingConfig
from cat.evaluation.diagnostics import max_logit
from cat.evaluation.scores import TOKENS_AT_ONCE, Split, TrainingSplit, autocast, in_parts
from cat.mixers.mamba.config import MambaConfig
from cat.mixers.registry import AnyModel
from cat.model import SequenceModel
from cat.ops.common import Operation, autocast_to_compute_dtype, merge_vmap_dim
from cat.tasks.base import IGNORE
from cat.training.cuda_graph import GraphedFunction
from cat.training.fit import (
    Run,
    State,
    Stop,
    ValidationRecord,
    batch_indices,
    cpu_state_dict,
    diverged,
    lr_scale,
    mean_loss,
    split_by_weight_decay,
    stop_reason,
    validation_record,
)
from cat.training.optimizer import BETAS, EPSILON

TOKENS_A_SUM = 512
"""Tokens of a partial sum of a linear map's gradient on a GPU: their largest divisor that this has too."""
LEAST_A_SUM = 64
"""Where a partial sum would have fewer, there is one sum over all tokens."""
MANY = 1 << 20
"""Weights of a map whose gradient fills a GPU with one sum."""


def can_ensemble(config: AnyModel) -> bool:
    """Whether `fit_together` takes models of `config`: all but those that run mamba_ssm's kernel, which vmap does not know."""
    sizes = {mixer.state for mixer in config.mixers if isinstance(mixer, MambaConfig)}
    if not sizes:
        return True
    from cat.mixers.mamba.op import fused_scan

    return all(fused_scan("cuda", torch.float32, size) is None for size in sizes)


def fit_ensemble(
    models: Sequence[SequenceModel],
    train: TrainingSplit,
    valid: Split,
    *,
    optimizer_config: OptimizerConfig,
    training_config: TrainingConfig,
    learning_rates: Sequence[float],
    seeds: Sequence[int],
    stop_early: bool,
    precision: Literal["float32", "bfloat16"] = "float32",
    progress: Callable[[int, int, ValidationRecord | None], None] = lambda place, step, row: None,
    resume: Sequence[State] | None = None,
    checkpoint: Callable[[Callable[[], dict[int, State]], bool], None] = lambda states, ended: None,
) -> list[Run]:
    """Trains `models`, all of one configuration, in place: each as `fit` does at its learning rate and seed, up to rounding.

    Losses are read where there is a look at the validation split; between looks nothing waits for the device. A replica that
    has ended leaves the stack at the look that finds it out. `progress` is told a place in `models`, and what `fit` tells it.

    `resume` has a state for each of them, all after the same step, none that has ended. After every step `checkpoint` is given
    what returns the states, by place, of those that took it, and whether one of them has ended with it. Raises
    torch.OutOfMemoryError where there is no memory for one replica at a time.
    """
    members = [
        Member(model, place, batch_indices(train.size, training_config.batch, seed), partial(progress, place))
        for place, (model, seed) in enumerate(zip(models, seeds, strict=True))
    ]
    for replica, state in zip(members, resume or (), strict=resume is not None):
        replica.resume(state)
    ensemble = Ensemble(models, learning_rates, optimizer_config=optimizer_config, precision=precision)
    step, recent, running = 0, list[Tensor](), members
    if resume is not None:
        step = resume[0].step
        recent += torch.stack([state.recent for state in resume], dim=1).to(train.device)
        ensemble.resume(step, [state.moments for state in resume])

    def states() -> dict[int, State]:
        since = torch.stack(recent, dim=1).cpu() if recent else torch.empty(len(running), 0, 2)
        for row, replica in enumerate(running):
            ensemble.unload(row, replica.model)
        return {replica.place: replica.state(step, ensemble.moments(row), since[row]) for row, replica in enumerate(running)}

    while running:
        until = min((step // optimizer_config.eval_every + 1) * optimizer_config.eval_every, training_config.steps)
        order = torch.stack([torch.stack([next(replica.batches) for replica in running]) for _ in range(step, until)])
        for rows in order.to(train.device):
            step += 1
            recent.append(ensemble.step(_gather(train, rows), lr_scale(step, training_config.steps, optimizer_config.warmup)))
            if step < until:
                for replica in running:
                    replica.progress(step, None)
                checkpoint(states, False)
        seen = zip(running, torch.stack(recent, dim=1).mT.tolist(), ensemble.score(valid), strict=True)
        for place, (replica, (losses, norms), scores) in enumerate(seen):
            ensemble.unload(place, replica.model)
            row = validation_record(step, losses, norms, *scores, max_logit(replica.model, valid.inputs))
            replica.record(row, losses, optimizer_config=optimizer_config, training_config=training_config, stop_early=stop_early)
        recent.clear()
        going = [row for row, replica in enumerate(running) if replica.run is None]
        checkpoint(states, len(going) < len(running))
        if going and len(going) < len(running):
            ensemble.keep(going)
        running = [running[row] for row in going]
    return [replica.run for replica in members if replica.run is not None]


@dataclass
class Member:
    """One of the models: where its batches come from, whom it tells, and what has become of it."""

    model: SequenceModel
    place: int
    batches: Iterator[Tensor]
    progress: Callable[[int, ValidationRecord | None], None]
    history: list[ValidationRecord] = field(default_factory=list)
    run: Run | None = None
    """None while it is in the stack."""

    def record(
        self,
        row: ValidationRecord,
        losses: Sequence[float],
        *,
        optimizer_config: OptimizerConfig,
        training_config: TrainingConfig,
        stop_early: bool,
    ) -> None:
        """What `fit` does with a look at the validation split, by the losses since the one before."""
        if (bad := diverged(losses)) is not None:
            self._end(row.step - len(losses) + 1 + bad, "diverged")
            return
        self.history.append(row)
        self.progress(row.step, row)
        if (stop := stop_reason(self.history, optimizer_config, training_config, stop_early=stop_early)) is not None:
            self._end(row.step, stop)

    def resume(self, state: State) -> None:
        """Goes back to where it stood."""
        self.model.load_state_dict(state.weights)
        self.history, self.batches = list(state.history), islice(self.batches, state.step, None)

    def state(self, step: int, moments: Tensor, recent: Tensor) -> State:
        """Where it stands, its weights and all, after `step` steps."""
        history, weights = list(self.history), cpu_state_dict(self.model)
        stop, step = (None, step) if self.run is None else (self.run.stop, self.run.steps)
        return State(step=step, history=history, weights=weights, moments=moments, recent=recent, stop=stop)

    def _end(self, steps: int, stop: Stop) -> None:
        self.run = Run(model=self.model, history=self.history, steps=steps, stop=stop)


class Ensemble:
    """R models of one configuration: their parameters as a matrix with a row for each, those with weight decay first.

    The state of AdamW (cat/training/optimizer.py) is two more matrices; what differs between replicas there is a column here.
    """

    def __init__(
        self,
        models: Sequence[SequenceModel],
        learning_rates: Sequence[float],
        *,
        optimizer_config: OptimizerConfig,
        precision: str,
    ):
        self.protocol, self.precision = optimizer_config, precision
        self.caller = _Caller(models[0])
        names = {id(parameter): name for name, parameter in models[0].named_parameters()}
        decayed, others = split_by_weight_decay(models[0])
        self.shapes = {names[id(parameter)]: parameter.shape for parameter in (*decayed, *others)}
        self.decayed = sum(parameter.numel() for parameter in decayed)
        self.weights = torch.stack([torch.cat([p.detach().flatten() for p in self._parameters(model)]) for model in models])
        self.mean, self.square = torch.zeros_like(self.weights), torch.zeros_like(self.weights)
        self.peaks = torch.tensor(learning_rates).to(self.weights).view(len(models), 1)
        self.steps, self.at_once = 0, len(models)
        self.replay = GraphedFunction(self._step)
        buffers = [dict(model.named_buffers()) for model in models]
        self.buffers = {name: torch.stack([own[name] for own in buffers]) for name in buffers[0]}

    def step(self, batches: Split, share: float) -> Float[Tensor, "R 2"]:
        """Losses and gradient norms on batches (R, B, ..), and then a step of AdamW at a share of the peak learning rates.

        Where there is no memory for all replicas at once, from then on for half as many at a time.
        """
        self.steps += 1
        corrections = 1 - BETAS[0] ** self.steps, 1 - BETAS[1] ** self.steps
        scalars = torch.tensor([share, *corrections]).to(self.weights, non_blocking=True)
        if self.weights.is_cuda:
            return self.replay(scalars, *batches).clone()
        return self._step(scalars, *batches)

    def _step(self, scalars: Float[Tensor, " 3"], *batches: Tensor) -> Float[Tensor, "R 2"]:
        while True:
            try:
                starts = range(0, len(self.weights), self.at_once)
                parts = [self._gradient(Split(*batches), slice(start, start + self.at_once)) for start in starts]
                break
            except torch.OutOfMemoryError:
                if self.at_once == 1 or (self.weights.is_cuda and torch.cuda.is_current_stream_capturing()):
                    raise
            self.at_once = -(-self.at_once // 2)
            torch.cuda.empty_cache()
        losses, gradient = (torch.cat(part) for part in zip(*parts, strict=True))
        return torch.stack([losses, self._descend(gradient, *scalars)], dim=1)

    def _gradient(self, batches: Split, rows: slice) -> tuple[Float[Tensor, " r"], Float[Tensor, "r P"]]:
        weights = self.weights[rows].detach().requires_grad_()
        part = Split(*(tensor[rows] for tensor in batches))
        losses = self._each(partial(mean_loss, precision=self.precision), weights, part, mapped=0, rows=rows)
        # A loss depends on its own row alone, so the gradient of their sum is that of each.
        (gradient,) = torch.autograd.grad(losses.sum(), weights)
        return losses.detach(), gradient

    @torch.no_grad()
    def score(self, split: Split) -> list[tuple[float, float]]:
        """Loss and accuracy of each model, as `cat.evaluation.score` has them, and with no more tokens at a time."""
        size = TOKENS_AT_ONCE[split.inputs.device.type] // (split.inputs.shape[1] * len(self.weights))
        marks = partial(_marks, precision=self.precision)
        parts = in_parts(lambda part: self._each(marks, self.weights, part, mapped=None), split, size)
        asked = (split.answers != IGNORE).sum()
        loss, right = (torch.stack(part).double().sum(0) / asked for part in zip(*parts, strict=True))
        return list(zip(loss.tolist(), right.tolist(), strict=True))

    @torch.no_grad()
    def unload(self, place: int, model: SequenceModel) -> None:
        """Gives `model` the weights of the row at `place`."""
        for parameter, row in zip(self._parameters(model), self._split(self.weights[place]), strict=True):
            parameter.copy_(row)

    def moments(self, place: int) -> Float[Tensor, "2 P"]:
        """Those of the row at `place`, as `AdamW` has them."""
        return torch.stack([self.mean[place], self.square[place]]).cpu()

    def resume(self, steps: int, moments: Sequence[Float[Tensor, "2 P"]]) -> None:
        """Goes on from where rows with these moments stood after `steps` steps."""
        self.steps = steps
        self.mean, self.square = torch.stack(list(moments), dim=1).to(self.weights.device)

    def keep(self, places: Sequence[int]) -> None:
        """Leaves the replicas at all other places out from now on."""
        self.replay.forget()
        index = torch.tensor(places, device=self.weights.device)
        self.weights, self.mean, self.square, self.peaks = (x[index] for x in (self.weights, self.mean, self.square, self.peaks))
        self.buffers = {name: buffer[index] for name, buffer in self.buffers.items()}

    @torch.no_grad()
    def _descend(
        self, gradient: Float[Tensor, "R P"], share: Tensor, first_correction: Tensor, second_correction: Tensor
    ) -> Float[Tensor, " R"]:
        norms = gradient.norm(dim=1)
        gradient /= (norms[:, None] / self.protocol.grad_clip).clamp(min=1)
        rates, (first, second) = self.peaks * share, BETAS
        self.mean.lerp_(gradient, 1 - first)
        self.square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        self.weights[:, : self.decayed] *= 1 - rates * self.protocol.weight_decay
        size = (self.square / second_correction).sqrt_().add_(EPSILON)
        self.weights.addcdiv_(self.mean * (rates / first_correction), size, value=-1)
        return norms

    def _each(
        self,
        function: Callable[..., Any],
        weights: Float[Tensor, "r P"],
        batch: Split,
        *,
        mapped: int | None,
        rows: slice = slice(None),
    ) -> Any:
        """`function(model, batch)` of the models `rows`; their batches lie along axis `mapped`, None: they have the same."""

        def call(tensors: dict[str, Tensor], batch: Split) -> Any:
            return functional_call(self.caller, tensors, (function, batch))

        tensors = dict(zip(self.shapes, self._split(weights), strict=True))
        tensors |= {name: buffer[rows] for name, buffer in self.buffers.items()}
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


def _gather(split: TrainingSplit, rows: Int[Tensor, "R B"]) -> Split:
    """The batches of all replicas, (R, B, ..)."""
    return Split(*(tensor.unflatten(0, rows.shape) for tensor in split.rows(rows.flatten())))


def _marks(model: SequenceModel, batch: Split, *, precision: str) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
    """Nats and right answers, added up over a batch."""
    with autocast(batch.inputs.device, precision):
        logits = model.logits_at(batch.inputs, batch.positions).float()
    loss = F.cross_entropy(logits.flatten(0, 1), batch.answers.flatten(), ignore_index=IGNORE, reduction="sum")
    return loss, (logits.argmax(-1) == batch.answers).sum()


class _Whole(TorchFunctionMode):
    """Three operations that vmap takes apart too soon, two of them before autocast has seen them, are called as a whole.

    The parts of attention are kernels that have no rule for vmap on a CPU; on a GPU they have one, under which they do not
    notice that a gradient will be asked for. Those of a linear map are products of which one is slow on a GPU.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            return _attend(*args, **kwargs)
        if function is F.conv1d:
            args = [autocast_to_compute_dtype(x) if isinstance(x, Tensor) else x for x in args]
        if function is F.linear and args[0].is_cuda:
            return _project(*args, **kwargs)
        return function(*args, **kwargs)


def _attend(q: Tensor, k: Tensor, v: Tensor, *, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
    masks = [] if attn_mask is None else [attn_mask.expand(len(q), -1, -1, -1)]
    return _Folded.apply(partial(F.scaled_dot_product_attention, **options), q, k, v, *masks)


def _project(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    y = _Projected.apply(autocast_to_compute_dtype(x).flatten(0, -2)[None], autocast_to_compute_dtype(weight)[None])[0].unflatten(
        0, x.shape[:-1]
    )
    return y if bias is None else y + autocast_to_compute_dtype(bias)


class _Projected(Operation):
    """Linear maps of tokens: (R, N, D) by (R, E, D) is (R, N, E). What vmap maps over are replicas.

    A weight's gradient is a sum over many tokens with few outcomes: parts of it are summed side by side, or most of a GPU idles.
    """

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return x @ weight.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor]:
        x, weight = ctx.saved_tensors
        size = _tokens_a_sum(x.shape[1], weight.numel())
        rows, columns = (t.unflatten(1, (-1, size)) for t in (gradient, x))
        return gradient @ weight if ctx.needs_input_grad[0] else None, (rows.mT @ columns).sum(1)

    @staticmethod
    def vmap(info: Any, mapped: tuple[int | None, ...], x: Tensor, weight: Tensor) -> tuple[Tensor, int]:
        folded = (merge_vmap_dim(t, axis, info.batch_size, into=0) for t, axis in zip((x, weight), mapped, strict=True))
        return _Projected.apply(*folded).unflatten(0, (info.batch_size, -1)), 0


def _tokens_a_sum(tokens: int, outcomes: int) -> int:
    size = math.gcd(tokens, TOKENS_A_SUM)
    return size if size >= LEAST_A_SUM and outcomes < MANY else tokens


class _Folded(Operation):
    """A function of batches whose sequences do not see each other: those of all replicas are one batch."""

    @staticmethod
    def forward(function: Callable[..., Tensor], *batches: Tensor) -> Tensor:
        raise NotImplementedError("for use under vmap; elsewhere, call the function itself")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing is kept: under vmap, autograd goes through what is called below."""

    @staticmethod
    def vmap(info: Any, mapped: tuple[int | None, ...], function: Callable[..., Tensor], *batches: Tensor) -> tuple[Tensor, int]:
        folded = [merge_vmap_dim(x, axis, info.batch_size, into=0) for x, axis in zip(batches, mapped[1:], strict=True)]
        return function(*folded).unflatten(0, (info.batch_size, -1)), 0
