"""Causal convolution as a sum of shifted copies: y = sum_{j < W} F_j shift(x, j dilation).

PyTorch, Numba (CPU) and Triton (GPU) each have a backend for it.
"""

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
from cat.types import ChannelKernel, HeadMixingKernel, Heads, InputHeads, MemberHeads, StackedHeads, StackedKernel


def filter_direct(x: Heads, kernel: ChannelKernel, dilation: int) -> Heads:
    return DirectConvolution.call(x[None, None], kernel[None, None], dilation)[0].squeeze(0)


class DirectConvolution(Operation):
    """Direct convolution of every group. vmap maps over the members of an ensemble."""

    @staticmethod
    def forward(x: StackedHeads, kernel: StackedKernel, dilation: int) -> tuple[MemberHeads, ...]:
        return backend_for(x).filter_stacks(x, kernel, dilation).unbind(1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[StackedHeads, StackedKernel, int], output: tuple[MemberHeads, ...]) -> None:
        x, kernel, ctx.dilation = inputs
        ctx.save_for_backward(x, kernel)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: MemberHeads) -> tuple[StackedHeads, StackedKernel, None]:
        return *DirectGradients.apply(*ctx.saved_tensors, ctx.dilation, *gradients), None

    @staticmethod
    def vmap(
        info: Any, mapped: tuple[int | None, ...], x: Tensor, kernel: Tensor, dilation: int
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        x, kernel = (merge_vmap_dim(t, axis, info.batch_size, into=0) for t, axis in zip((x, kernel), mapped, strict=False))
        outputs = DirectConvolution.apply(x, kernel, dilation)
        return tuple(y.unflatten(0, (info.batch_size, -1)) for y in outputs), (0,) * len(outputs)


class DirectGradients(Operation):
    """Gradients of `DirectConvolution`. They are an operation of their own so that torch.vmap can map the backward pass."""

    @staticmethod
    def forward(
        x: StackedHeads, kernel: StackedKernel, dilation: int, *gradients: MemberHeads
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
        grad_x, grad_kernel = DirectGradients.apply(x, kernel, dilation, *others)
        return (grad_x.unflatten(0, (info.batch_size, -1)), grad_kernel.unflatten(0, (info.batch_size, -1))), (0, 0)


def backend_for(x: Tensor) -> ModuleType:
    """Return the backend for the device of `x`."""
    if uses_numba(x):
        # Imported only here: Numba takes time to import, and many models have no convolution.
        from cat.ops.conv import numba_backend

        return numba_backend
    return triton_or_torch() if x.is_cuda else torch_backend


def uses_numba(x: Tensor) -> bool:
    """Whether Numba computes the direct convolution of `x`. torch.compile cannot trace Numba's functions."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


@functools.cache
def triton_or_torch() -> ModuleType:
    """Return the Triton backend if Triton is installed. PyTorch installs it for a GPU on Linux."""
    try:
        from cat.ops.conv import triton_backend
    except ImportError:
        return torch_backend
    return triton_backend


def mix_direct(x: InputHeads, kernel: HeadMixingKernel, dilation: int) -> Heads:
    return MixedConvolution.call(x, kernel, dilation)


class MixedConvolution(Operation):
    """One matrix product with the shifted copies of all heads, for the output and for each gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: InputHeads, kernel: HeadMixingKernel, dilation: int) -> Heads:
        span = (kernel.shape[2] - 1) * dilation
        return (kernel.flip(2).flatten(1) @ _shifted_copies(F.pad(x, (0, 0, span, 0)), kernel, dilation)).unflatten(
            2, x.shape[2:]
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[InputHeads, HeadMixingKernel, int], output: Heads) -> None:
        x, kernel, ctx.dilation = inputs
        ctx.save_for_backward(x, kernel)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Heads) -> tuple[InputHeads, HeadMixingKernel, None]:
        x, kernel = (saved.to(gradient.dtype) for saved in ctx.saved_tensors)  # as autocast did in the forward pass
        span = (kernel.shape[2] - 1) * ctx.dilation
        later = _shifted_copies(F.pad(gradient, (0, 0, 0, span)), kernel, ctx.dilation)
        grad_x = (kernel.transpose(0, 1).flatten(1) @ later).unflatten(2, x.shape[2:])
        grad_kernel = (x.flatten(2) @ later.mT).sum(0).unflatten(1, (len(kernel), -1)).transpose(0, 1)
        return grad_x, grad_kernel, None


def _shifted_copies(padded: Float[Tensor, "B N P C"], kernel: HeadMixingKernel, dilation: int) -> Float[Tensor, "B NW LC"]:
    """Return W copies of each head, each starting `dilation` tokens later than the previous one."""
    starts = range(0, kernel.shape[2] * dilation, dilation)
    length = padded.shape[2] - starts[-1]
    return torch.stack([padded.narrow(2, start, length) for start in starts], dim=2).flatten(1, 2).flatten(2)
