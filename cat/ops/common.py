"""Helpers of the operations: autograd functions, vmap and precision."""

import inspect
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn


class Operation(torch.autograd.Function):
    """Autograd function that caches the signature of `forward`.

    PyTorch inspects the signature at every call, which costs 0.02 ms.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        vars(cls)["forward"].__func__.__signature__ = inspect.signature(cls.forward)

    @classmethod
    def call(cls, *inputs: Any) -> Any:
        """Apply an operation whose `forward` PyTorch could differentiate too.

        torch.compile and torch.export do so: they fuse the passes themselves, and cannot trace autograd functions of any length.
        """
        return cls.forward(*inputs) if torch.compiler.is_compiling() else cls.apply(*inputs)


def merge_vmap_dim(x: Shaped[Tensor, "*shape"], mapped: int | None, size: int, *, into: int) -> Shaped[Tensor, "*folded"]:
    """Merge the mapped axis of `x` into another axis, so that one large call replaces the calls that torch.vmap maps.

    `mapped` is the mapped axis and `size` its length. None: `x` has no mapped axis and is repeated `size` times. `into` counts
    the axes without the mapped one; this axis becomes `size` times as long.
    """
    x = x.expand(size, *x.shape) if mapped is None else x.movedim(mapped, 0)
    return x.movedim(0, into).flatten(into, into + 1)


def is_mapped(x: Tensor) -> bool:
    """Whether torch.vmap maps over an axis of `x`."""
    return torch._C._functorch.is_batchedtensor(x)


def chunk_size(length: int, most: int) -> int:
    """Return the tokens per chunk: `most`, or fewer for a shorter sequence. A compiled graph is for all lengths."""
    return most if torch.compiler.is_compiling() else min(most, length)


def in_chunks(
    x: Float[Tensor, "B H L C"], size: int, *, value: float = 0.0, unrolled: bool = False
) -> Float[Tensor, "B H N S C"]:
    """Split tokens into chunks of `size`, the last one padded with `value`.

    `unrolled`: the caller has a loop over the chunks, so a compiled graph is for one number of chunks.
    """
    length = x.shape[2]
    count = (length + size - 1) // size
    if torch.compiler.is_compiling():
        x = x.contiguous()  # F.pad without padding keeps the memory order, which the compiler does not expect
        if unrolled:
            count = len(x.split(size, dim=2))  # a constant of the graph, as are all sizes that follow from it
    return F.pad(x, (0, 0, 0, count * size - length), value=value).unflatten(2, (count, size))


def autocast_enabled(x: Tensor) -> bool:
    """Whether autocast is enabled on the device of `x`."""
    device = x.device.type
    # PyTorch raises an error for a device without autocast, such as meta.
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def autocast_to_compute_dtype(x: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """Cast `x` as autocast casts an input of a matrix product or a convolution."""
    return x.to(torch.get_autocast_dtype(x.device.type)) if autocast_enabled(x) and x.dtype != torch.float64 else x


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Disable autocast on the device of `x`."""
    return torch.autocast(x.device.type, enabled=False) if autocast_enabled(x) else nullcontext()


def to_float32(x: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """Cast `x` to float32, or keep float64: sums over many tokens are inexact or overflow in half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@torch.no_grad()
def set_values(tensor: Shaped[Tensor, "*shape"], values: Shaped[Tensor, "*shape"]) -> None:
    """Overwrite a parameter or buffer, also one that is sharded; every process then has its part of the first one's values."""
    if hasattr(tensor, "device_mesh"):
        from torch.distributed.tensor import DTensor, distribute_tensor

        assert isinstance(tensor, DTensor)
        values = distribute_tensor(values.to(tensor.device), tensor.device_mesh, tensor.placements)
    tensor.copy_(values)


def reset_parameters(module: nn.Module) -> None:
    """Initialize the parameters and buffers of a module and of all modules in it."""
    for part in module.modules():
        if callable(reset := getattr(part, "reset_parameters", None)):
            reset()
