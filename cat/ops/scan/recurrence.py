"""Recurrences as autograd operations whose passes are compiled loops on a CPU."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cat.ops.common import Operation, merge_vmap_dim

MAX_MATRIX = 128 * 128
"""Most numbers in the state of a head. A larger one does not fit into the fastest cache, and matrix products are faster."""

Inputs = tuple[Tensor, ...]
Reference = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Loops:
    """The compiled passes of a recurrence. The batch is the first axis of every tensor."""

    forward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    """forward(keep, *inputs): the outputs and the last state; if `keep`, also the tensors for the gradient."""
    gradients: Callable[..., Inputs]
    """gradients(kept, grad_outputs, grad_state, *inputs): the gradient of every input."""
    reference: Reference
    """reference(*inputs): the outputs and the last state in PyTorch operations, for gradients of gradients."""


def matrix_loops(name: str, reference: Reference, *inputs: Tensor) -> Loops | None:
    """Return the loops `name` of numba_matrix.py; None if PyTorch should compute `inputs`. The last one is the first state."""
    if not _use_loops(inputs) or inputs[-1].shape[2] * inputs[-1].shape[3] > MAX_MATRIX:
        return None
    from cat.ops.scan import numba_matrix  # takes time to import

    return Loops(*numba_matrix.LOOPS[name], reference)


def selective_loops(reference: Reference, *inputs: Tensor) -> Loops | None:
    """Return the loops of numba_selective.py; None if PyTorch should compute `inputs`."""
    if not _use_loops(inputs):
        return None
    from cat.ops.scan import numba_selective

    return Loops(numba_selective.selective_forward, numba_selective.selective_gradients, reference)


def run_recurrence(loops: Loops, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Return the outputs and the last state. The last input is the first state."""
    outputs, state, _ = _Recurrence.apply(loops, torch.is_grad_enabled(), *inputs)
    return outputs, state


def _use_loops(inputs: Inputs) -> bool:
    """Whether loops support these inputs. torch.compile cannot trace them, and fuses PyTorch's operations itself."""
    dtype = inputs[0].dtype
    return (
        dtype in (torch.float32, torch.float64)
        and all(x.device.type == "cpu" and x.dtype == dtype for x in inputs)
        and not torch.compiler.is_compiling()
    )


class _Recurrence(Operation):
    @staticmethod
    def forward(loops: Loops, keep: bool, *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return loops.forward(keep, *inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        outputs, _, kept = output
        ctx.loops, ctx.shape = inputs[0], outputs.shape
        ctx.mark_non_differentiable(kept)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[2:], kept)

    @staticmethod
    def backward(ctx: Any, grad_outputs: Tensor | None, grad_state: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        *inputs, kept = ctx.saved_tensors
        grad_outputs = inputs[0].new_zeros(ctx.shape) if grad_outputs is None else grad_outputs
        grad_state = torch.zeros_like(inputs[-1]) if grad_state is None else grad_state
        return None, None, *_Gradients.apply(ctx.loops, kept, grad_outputs, grad_state, *inputs)

    @staticmethod
    def vmap(info: Any, mapped: tuple[int | None, ...], *inputs: Any) -> tuple[Inputs, tuple[int, int, int]]:
        outputs = _Recurrence.apply(*inputs[:2], *_merge(info, mapped[2:], inputs[2:]))
        return _unmerge(info, outputs), (0, 0, 0)


class _Gradients(Operation):
    """Gradients of `_Recurrence`. They are an operation of their own so that torch.vmap can map the backward pass."""

    @staticmethod
    def forward(loops: Loops, kept: Tensor, grad_outputs: Tensor, grad_state: Tensor, *inputs: Tensor) -> Inputs:
        return loops.gradients(kept, grad_outputs, grad_state, *inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Inputs) -> None:
        ctx.loops = inputs[0]
        ctx.save_for_backward(*inputs[2:])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Differentiate the gradients of the PyTorch operations."""

        def first_gradients(grad_outputs: Tensor, grad_state: Tensor, *inputs: Tensor) -> Inputs:
            return torch.func.vjp(ctx.loops.reference, *inputs)[1]((grad_outputs, grad_state))

        return None, None, *torch.func.vjp(first_gradients, *ctx.saved_tensors)[1](gradients)

    @staticmethod
    def vmap(info: Any, mapped: tuple[int | None, ...], loops: Loops, *inputs: Tensor) -> tuple[Inputs, tuple[int, ...]]:
        gradients = _Gradients.apply(loops, *_merge(info, mapped[1:], inputs))
        return _unmerge(info, gradients), (0,) * len(gradients)


def _merge(info: Any, mapped: tuple[int | None, ...], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    return [merge_vmap_dim(x, axis, info.batch_size, into=0) for x, axis in zip(inputs, mapped, strict=True)]


def _unmerge(info: Any, outputs: tuple[Tensor, ...]) -> Inputs:
    return tuple(x.unflatten(0, (info.batch_size, -1)) for x in outputs)
