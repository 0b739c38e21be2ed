"""Causal convolution as a sum of shifted copies."""

import functools
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from cat.ops.common import Operation, merge_vmap_dim
from cat.ops.conv import torch_backend
from cat.types import ChannelKernel, HeadMixingKernel, Heads, Replicated, Sources, StackedHeads, StackedKernel


def filter_direct(x: Heads, kernel: ChannelKernel, dilation: int) -> Heads:
    return DirectConvolution.apply(x[None, None], kernel[None, None], dilation)[0].squeeze(0)


class DirectConvolution(Operation):
    """The sum of a few shifted copies, of each of the groups. What vmap maps over are replicas."""

    @staticmethod
    def forward(x: StackedHeads, kernel: StackedKernel, dilation: int) -> tuple[Replicated, ...]:
        return backend_for(x).filter_stacks(x, kernel, dilation).unbind(1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[StackedHeads, StackedKernel, int], output: tuple[Replicated, ...]) -> None:
        x, taps, ctx.dilation = inputs
        ctx.save_for_backward(x, taps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Replicated) -> tuple[StackedHeads, StackedKernel, None]:
        return *DirectGradients.apply(*ctx.saved_tensors, ctx.dilation, *gradients), None

    @staticmethod
    def vmap(
        info: Any, mapped: tuple[int | None, ...], x: Tensor, kernel: Tensor, dilation: int
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        stacks, rows = (merge_vmap_dim(t, axis, info.batch_size, into=0) for t, axis in zip((x, kernel), mapped, strict=False))
        outputs = DirectConvolution.apply(stacks, rows, dilation)
        return tuple(y.unflatten(0, (info.batch_size, -1)) for y in outputs), (0,) * len(outputs)


class DirectGradients(Operation):
    """Those of `_Shifts`; an operation too, or torch.vmap would not take gradients of one sequence after the other."""

    @staticmethod
    def forward(
        x: StackedHeads, kernel: StackedKernel, dilation: int, *gradients: Replicated
    ) -> tuple[StackedHeads, StackedKernel]:
        return backend_for(x).filter_gradients(x, kernel, gradients, dilation)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(
        info: Any, mapped: tuple[int | None, ...], x: Tensor, kernel: Tensor, dilation: int, *gradients: Tensor
    ) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        tensors, axes = (x, kernel, *gradients), (*mapped[:2], *mapped[3:])
        x, kernel, *others = (merge_vmap_dim(t, axis, info.batch_size, into=0) for t, axis in zip(tensors, axes, strict=True))
        of_x, of_taps = DirectGradients.apply(x, kernel, dilation, *others)
        return (of_x.unflatten(0, (info.batch_size, -1)), of_taps.unflatten(0, (info.batch_size, -1))), (0, 0)


def backend_for(x: Tensor) -> ModuleType:
    """The module that sums shifted copies where `x` is. Numba takes time to import, and many models have no filters."""
    if uses_numba(x):
        from cat.ops.conv import numba_backend

        return numba_backend
    return triton_or_torch() if x.is_cuda else torch_backend


def uses_numba(x: Tensor) -> bool:
    """Whether loops do that; torch.compile sees through none of Numba's."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


@functools.cache
def triton_or_torch() -> ModuleType:
    """Triton's, where PyTorch has brought Triton along: for a GPU on Linux."""
    try:
        from cat.ops.conv import triton_backend
    except ImportError:
        return torch_backend
    return triton_backend


def mix_direct(x: Sources, kernel: HeadMixingKernel, dilation: int) -> Heads:
    return MixedConvolution.apply(x, kernel, dilation)


class MixedConvolution(Operation):
    """One product with the shifted copies of all heads, forwards and for each gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Sources, kernel: HeadMixingKernel, dilation: int) -> Heads:
        span = (kernel.shape[2] - 1) * dilation
        return (kernel.flip(2).flatten(1) @ _shifted_copies(F.pad(x, (0, 0, span, 0)), kernel, dilation)).unflatten(
            2, x.shape[2:]
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Sources, HeadMixingKernel, int], output: Heads) -> None:
        x, taps, ctx.dilation = inputs
        ctx.save_for_backward(x, taps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Heads) -> tuple[Sources, HeadMixingKernel, None]:
        x, taps = (saved.to(gradient.dtype) for saved in ctx.saved_tensors)  # as autocast did
        span = (taps.shape[2] - 1) * ctx.dilation
        later = _shifted_copies(F.pad(gradient, (0, 0, 0, span)), taps, ctx.dilation)
        of_x = (taps.transpose(0, 1).flatten(1) @ later).unflatten(2, x.shape[2:])
        of_taps = (x.flatten(2) @ later.mT).sum(0).unflatten(1, (len(taps), -1)).transpose(0, 1)
        return of_x, of_taps, None


def _shifted_copies(padded: Float[Tensor, "B N P C"], kernel: HeadMixingKernel, dilation: int) -> Float[Tensor, "B NW LC"]:
    """Of each head as many copies as there are taps, each begun `dilation` tokens later."""
    rows, step = padded.flatten(2), dilation * padded.shape[3]
    return rows.unfold(2, rows.shape[2] - (kernel.shape[2] - 1) * step, step).flatten(1, 2)
