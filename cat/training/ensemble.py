"""An optimisation for GPUs: train all seeds and learning rates of a cell as one ensemble.

A tiny model does not fill a GPU. Every tensor gets a leading ensemble axis, over which torch.vmap maps the model. A step of the
ensemble launches as many operations as a step of one model. The members train as `fit` trains each alone, up to rounding.
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

from cat.config import ModelConfig, TrainingConfig
from cat.evaluation.diagnostics import max_logit
from cat.evaluation.scores import TOKENS_AT_ONCE, Split, TrainingSplit, autocast, map_chunks
from cat.mixers.mamba.config import MambaConfig
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
    first_non_finite,
    lr_scale,
    mean_loss,
    split_by_weight_decay,
    stop_reason,
    validation_record,
)
from cat.training.optimizer import BETAS, EPSILON

TOKENS_PER_SUM = 512
"""Tokens per partial sum of a weight gradient on a GPU. The greatest common divisor with the number of tokens is used."""
MIN_TOKENS_PER_SUM = 64
"""Below this, the gradient is one sum over all tokens."""
MAX_SPLIT_WEIGHTS = 1 << 20
"""From this many weights on, one sum over all tokens fills a GPU."""


def can_ensemble(config: ModelConfig) -> bool:
    """Return whether `fit_ensemble` can train `config`.

    It cannot if Mamba uses mamba_ssm's kernel, which has no vmap rule, or if the model differs in training: `score` does not
    switch its mode, and dropout must depend on the seed of each member only.
    """
    if config.differs_in_training:
        return False
    sizes = {mixer.state for mixer in config.layer_mixers if isinstance(mixer, MambaConfig)}
    if not sizes:
        return True
    from cat.mixers.mamba.op import fused_scan

    return all(fused_scan("cuda", torch.float32, size) is None for size in sizes)


def fit_ensemble(
    models: Sequence[SequenceModel],
    train: TrainingSplit,
    valid: Split,
    *,
    config: TrainingConfig,
    learning_rates: Sequence[float],
    seeds: Sequence[int],
    stop_early: bool,
    precision: Literal["float32", "bfloat16"] = "float32",
    progress: Callable[[int, int, ValidationRecord | None], None] = lambda index, step, record: None,
    resume: Sequence[State] | None = None,
    checkpoint: Callable[[Callable[[], dict[int, State]], bool], None] = lambda states, ended: None,
) -> list[Run]:
    """Train `models` of one configuration in place, each as `fit` does at its learning rate and seed, up to rounding.

    Losses are read only at a validation; between validations nothing waits for the device. A member whose run ended leaves the
    ensemble at the next validation. `progress` gets the index in `models` and the arguments that `fit` passes.

    `resume` has one state per model, all after the same step, all of runs that have not ended. `checkpoint` is called after every
    step with a function that returns the states of the current members by index, and with whether one of their runs ended.

    Raises torch.OutOfMemoryError if the memory does not suffice for one member at a time.
    """
    members = [
        Member(model, index, batch_indices(train.size, config.batch, seed), partial(progress, index))
        for index, (model, seed) in enumerate(zip(models, seeds, strict=True))
    ]
    for member, state in zip(members, resume or (), strict=resume is not None):
        member.resume(state)
    ensemble = Ensemble(models, learning_rates, config=config, precision=precision)
    step, recent, running = 0, list[Tensor](), members
    if resume is not None:
        step = resume[0].step
        recent += torch.stack([state.recent for state in resume], dim=1).to(train.device)
        ensemble.resume(step, [state.moments for state in resume])

    def states() -> dict[int, State]:
        recent_of = torch.stack(recent, dim=1).cpu() if recent else torch.empty(len(running), 0, 2)
        for row, member in enumerate(running):
            ensemble.copy_weights(row, member.model)
        return {member.index: member.state(step, ensemble.moments(row), recent_of[row]) for row, member in enumerate(running)}

    while running:
        until = min((step // config.eval_every + 1) * config.eval_every, config.steps)
        order = torch.stack([torch.stack([next(member.batches) for member in running]) for _ in range(step, until)])
        for batch_rows in order.to(train.device):
            step += 1
            batches = _gather(train, batch_rows)
            recent.append(ensemble.step(batches, lr_scale(step, config.steps, config.warmup)))
            if step < until:
                for member in running:
                    member.progress(step, None)
                checkpoint(states, False)
        evaluated = zip(running, torch.stack(recent, dim=1).mT.tolist(), ensemble.score(valid), strict=True)
        for row, (member, (losses, grad_norms), scores) in enumerate(evaluated):
            ensemble.copy_weights(row, member.model)
            record = validation_record(step, losses, grad_norms, *scores, max_logit(member.model, valid.inputs))
            member.record(record, losses, config=config, stop_early=stop_early)
        recent.clear()
        kept = [row for row, member in enumerate(running) if member.run is None]
        checkpoint(states, len(kept) < len(running))
        if kept and len(kept) < len(running):
            ensemble.keep(kept)
        running = [running[row] for row in kept]
    return [member.run for member in members if member.run is not None]


@dataclass
class Member:
    """One model of the ensemble, with its batches, history and result."""

    model: SequenceModel
    index: int
    batches: Iterator[Tensor]
    progress: Callable[[int, ValidationRecord | None], None]
    history: list[ValidationRecord] = field(default_factory=list)
    run: Run | None = None
    """None while the member trains."""

    def record(
        self,
        record: ValidationRecord,
        losses: Sequence[float],
        *,
        config: TrainingConfig,
        stop_early: bool,
    ) -> None:
        """Handle a validation as `fit` does; `losses` are those since the previous one."""
        if (diverged_at := first_non_finite(losses)) is not None:
            self._end(record.step - len(losses) + 1 + diverged_at, "diverged")
            return
        self.history.append(record)
        self.progress(record.step, record)
        if (stop := stop_reason(self.history, config, stop_early=stop_early)) is not None:
            self._end(record.step, stop)

    def resume(self, state: State) -> None:
        self.model.load_state_dict(state.weights)
        self.history, self.batches = list(state.history), islice(self.batches, state.step, None)

    def state(self, step: int, moments: Tensor, recent: Tensor) -> State:
        """Return the state after `step` steps, or after the last step of an ended run."""
        history, weights = list(self.history), cpu_state_dict(self.model)
        stop, step = (None, step) if self.run is None else (self.run.stop, self.run.steps)
        return State(step=step, history=history, weights=weights, moments=moments, recent=recent, stop=stop)

    def _end(self, steps: int, stop: Stop) -> None:
        self.run = Run(model=self.model, history=self.history, steps=steps, stop=stop)


class Ensemble:
    """The parameters of R models of one configuration as a matrix with one row per model, decayed parameters first.

    The moments of AdamW (cat/training/optimizer.py) are two more such matrices. The learning rates are a column.
    """

    def __init__(
        self,
        models: Sequence[SequenceModel],
        learning_rates: Sequence[float],
        *,
        config: TrainingConfig,
        precision: str,
    ):
        self.config, self.precision = config, precision
        self.function_module = _FunctionModule(models[0])
        names = {id(parameter): name for name, parameter in models[0].named_parameters()}
        decayed, others = split_by_weight_decay(models[0])
        self.shapes = {names[id(parameter)]: parameter.shape for parameter in (*decayed, *others)}
        self.decayed = sum(parameter.numel() for parameter in decayed)
        self.weights = torch.stack([torch.cat([p.detach().flatten() for p in self._parameters(model)]) for model in models])
        self.mean, self.square = torch.zeros_like(self.weights), torch.zeros_like(self.weights)
        self.learning_rates = torch.tensor(learning_rates).to(self.weights).view(len(models), 1)
        self.steps, self.members_at_once = 0, len(models)
        self.graphed_step = GraphedFunction(self._step)
        buffers = [dict(model.named_buffers()) for model in models]
        self.buffers = {name: torch.stack([of_model[name] for of_model in buffers]) for name in buffers[0]}

    def step(self, batches: Split, scale: float) -> Float[Tensor, "R 2"]:
        """Take one step of AdamW on batches (R, B, ..) and return the losses and gradient norms.

        `scale` multiplies the peak learning rates. If the memory does not suffice for all members at once, half as many are
        computed at a time from then on.
        """
        self.steps += 1
        corrections = 1 - BETAS[0] ** self.steps, 1 - BETAS[1] ** self.steps
        scalars = torch.tensor([scale, *corrections]).to(self.weights, non_blocking=True)
        if self.weights.is_cuda:
            return self.graphed_step(scalars, *batches).clone()
        return self._step(scalars, *batches)

    def _step(self, scalars: Float[Tensor, " 3"], *batches: Tensor) -> Float[Tensor, "R 2"]:
        while True:
            try:
                starts = range(0, len(self.weights), self.members_at_once)
                parts = [self._gradient(Split(*batches), slice(start, start + self.members_at_once)) for start in starts]
                break
            except torch.OutOfMemoryError:
                if self.members_at_once == 1 or (self.weights.is_cuda and torch.cuda.is_current_stream_capturing()):
                    raise
            self.members_at_once = -(-self.members_at_once // 2)
            torch.cuda.empty_cache()
        losses, gradient = (torch.cat(part) for part in zip(*parts, strict=True))
        return torch.stack([losses, self._adamw_step(gradient, *scalars)], dim=1)

    def _gradient(self, batches: Split, rows: slice) -> tuple[Float[Tensor, " r"], Float[Tensor, "r P"]]:
        weights = self.weights[rows].detach().requires_grad_()
        part = Split(*(tensor[rows] for tensor in batches))
        losses = self._vmap(partial(mean_loss, precision=self.precision), weights, part, mapped=0, rows=rows)
        # Each loss depends only on its own row, so the gradient of the sum holds the gradient of each.
        (gradient,) = torch.autograd.grad(losses.sum(), weights)
        return losses.detach(), gradient

    @torch.no_grad()
    def score(self, split: Split) -> list[tuple[float, float]]:
        """Return loss and accuracy of each model, as `cat.evaluation.scores.score`, with as many tokens per chunk."""
        size = TOKENS_AT_ONCE[split.inputs.device.type] // (split.inputs.shape[1] * len(self.weights))
        summed_scores = partial(_summed_scores, precision=self.precision)
        chunks = map_chunks(lambda chunk: self._vmap(summed_scores, self.weights, chunk, mapped=None), split, size)
        targets = (split.answers != IGNORE).sum()
        loss, accuracy = (torch.stack(sums).double().sum(0) / targets for sums in zip(*chunks, strict=True))
        return list(zip(loss.tolist(), accuracy.tolist(), strict=True))

    @torch.no_grad()
    def copy_weights(self, row: int, model: SequenceModel) -> None:
        """Copy the weights of `row` to `model`."""
        for parameter, weight in zip(self._parameters(model), self._split(self.weights[row]), strict=True):
            parameter.copy_(weight)

    def moments(self, row: int) -> Float[Tensor, "2 P"]:
        """Return the moments of `row` in the layout of `AdamW.moments`."""
        return torch.stack([self.mean[row], self.square[row]]).cpu()

    def resume(self, steps: int, moments: Sequence[Float[Tensor, "2 P"]]) -> None:
        """Restore the moments of each row after `steps` steps."""
        self.steps = steps
        self.mean, self.square = torch.stack(list(moments), dim=1).to(self.weights.device)

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but these."""
        self.graphed_step.reset()
        index = torch.tensor(rows, device=self.weights.device)
        self.weights, self.learning_rates = self.weights[index], self.learning_rates[index]
        self.mean, self.square = self.mean[index], self.square[index]
        self.buffers = {name: buffer[index] for name, buffer in self.buffers.items()}

    @torch.no_grad()
    def _adamw_step(
        self, gradient: Float[Tensor, "R P"], scale: Tensor, first_correction: Tensor, second_correction: Tensor
    ) -> Float[Tensor, " R"]:
        norms = gradient.norm(dim=1)
        gradient /= (norms[:, None] / self.config.grad_clip).clamp(min=1)
        rates, (first, second) = self.learning_rates * scale, BETAS
        self.mean.lerp_(gradient, 1 - first)
        self.square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        self.weights[:, : self.decayed] *= 1 - rates * self.config.weight_decay
        denominator = (self.square / second_correction).sqrt_().add_(EPSILON)
        self.weights.addcdiv_(self.mean * (rates / first_correction), denominator, value=-1)
        return norms

    def _vmap(
        self,
        function: Callable[..., Any],
        weights: Float[Tensor, "r P"],
        batch: Split,
        *,
        mapped: int | None,
        rows: slice = slice(None),
    ) -> Any:
        """Map `function(model, batch)` over the models `rows`.

        `mapped` is the axis of `batch` with one batch per model; None if all models share the batch.
        """

        def call(tensors: dict[str, Tensor], batch: Split) -> Any:
            return functional_call(self.function_module, tensors, (function, batch))

        tensors = dict(zip(self.shapes, self._split(weights), strict=True))
        tensors |= {name: buffer[rows] for name, buffer in self.buffers.items()}
        with _WholeOperations():
            return vmap(call, in_dims=(0, mapped))({f"model.{name}": tensor for name, tensor in tensors.items()}, batch)

    def _split(self, weights: Float[Tensor, "*R P"]) -> list[Tensor]:
        parts = weights.split([shape.numel() for shape in self.shapes.values()], dim=-1)
        return [part.unflatten(-1, shape) for part, shape in zip(parts, self.shapes.values(), strict=True)]

    def _parameters(self, model: SequenceModel) -> list[nn.Parameter]:
        return [model.get_parameter(name) for name in self.shapes]


class _FunctionModule(nn.Module):
    """Lets functional_call, which calls a module, call a function of the model."""

    def __init__(self, model: SequenceModel):
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., Any], batch: Split) -> Any:
        return function(self.model, batch)


def _gather(split: TrainingSplit, rows: Int[Tensor, "R B"]) -> Split:
    """Return the batches of all members, (R, B, ..)."""
    return Split(*(tensor.unflatten(0, rows.shape) for tensor in split.rows(rows.flatten())))


def _summed_scores(model: SequenceModel, batch: Split, *, precision: str) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
    """Return the summed loss in nats and the number of correct answers of a batch."""
    with autocast(batch.inputs.device, precision):
        logits = model.logits_at(batch.inputs, batch.positions).float()
    loss = F.cross_entropy(logits.flatten(0, 1), batch.answers.flatten(), ignore_index=IGNORE, reduction="sum")
    return loss, (logits.argmax(-1) == batch.answers).sum()


class _WholeOperations(TorchFunctionMode):
    """Intercepts three operations that vmap decomposes too early, two of them before autocast applies.

    Attention decomposes into kernels without a vmap rule on a CPU. On a GPU they have one, but it does not notice that a gradient
    is needed. A linear map decomposes into products, one of which is slow on a GPU.
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
    return _FoldedIntoBatch.apply(partial(F.scaled_dot_product_attention, **options), q, k, v, *masks)


def _project(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    tokens, weights = autocast_to_compute_dtype(x).flatten(0, -2)[None], autocast_to_compute_dtype(weight)[None]
    y = _LinearMap.apply(tokens, weights)[0].unflatten(0, x.shape[:-1])
    return y if bias is None else y + autocast_to_compute_dtype(bias)


class _LinearMap(Operation):
    """Linear maps of tokens, one per member: (R, N, D) by (R, E, D) is (R, N, E). vmap maps over members.

    The gradient of a weight is a sum over many tokens with a small result. Partial sums run in parallel, or most of a GPU idles.
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
        size = _tokens_per_sum(x.shape[1], weight.numel())
        rows, columns = (t.unflatten(1, (-1, size)) for t in (gradient, x))
        return gradient @ weight if ctx.needs_input_grad[0] else None, (rows.mT @ columns).sum(1)

    @staticmethod
    def vmap(info: Any, mapped: tuple[int | None, ...], x: Tensor, weight: Tensor) -> tuple[Tensor, int]:
        folded = (merge_vmap_dim(t, axis, info.batch_size, into=0) for t, axis in zip((x, weight), mapped, strict=True))
        return _LinearMap.apply(*folded).unflatten(0, (info.batch_size, -1)), 0


def _tokens_per_sum(tokens: int, weights: int) -> int:
    size = math.gcd(tokens, TOKENS_PER_SUM)
    return size if size >= MIN_TOKENS_PER_SUM and weights < MAX_SPLIT_WEIGHTS else tokens


class _FoldedIntoBatch(Operation):
    """A function of independent sequences: the batches of all members are concatenated into one."""

    @staticmethod
    def forward(function: Callable[..., Tensor], *batches: Tensor) -> Tensor:
        raise NotImplementedError("only for use under vmap; elsewhere, call the function itself")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Save nothing: under vmap, autograd differentiates the function called below."""

    @staticmethod
    def vmap(info: Any, mapped: tuple[int | None, ...], function: Callable[..., Tensor], *batches: Tensor) -> tuple[Tensor, int]:
        folded = [merge_vmap_dim(x, axis, info.batch_size, into=0) for x, axis in zip(batches, mapped[1:], strict=True)]
        return function(*folded).unflatten(0, (info.batch_size, -1)), 0
