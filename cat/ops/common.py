"""What our own operations have in common, most of which have gradients by hand."""

import inspect
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor


class Operation(torch.autograd.Function):
    """One whose `forward` is inspected once: PyTorch does so at every call, a fiftieth of a millisecond each."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        vars(cls)["forward"].__func__.__signature__ = inspect.signature(cls.forward)


def merge_vmap_dim(x: Shaped[Tensor, "*shape"], mapped: int | None, size: int, *, into: int) -> Shaped[Tensor, "*folded"]:
    """`x` without its axis `mapped`, of `size`, and with as many times more along axis `into`; None: the same `x` every time.

    Many calls that torch.vmap maps over that axis become one larger call.
    """
    x = x.expand(size, *x.shape) if mapped is None else x.movedim(mapped, 0)
    return x.movedim(0, into).flatten(into, into + 1)


def autocast_enabled(x: Tensor) -> bool:
    """Whether autocast is at work where `x` is. PyTorch raises an error for a device that knows none, such as meta."""
    device = x.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def autocast_to_compute_dtype(x: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """`x` in the precision that autocast gives an operand of a product or a convolution."""
    return x.to(torch.get_autocast_dtype(x.device.type)) if autocast_enabled(x) and x.dtype != torch.float64 else x


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """For what is to be computed in the precision that its numbers have, where `x` is."""
    return torch.autocast(x.device.type, enabled=False) if autocast_enabled(x) else nullcontext()


def to_float32(x: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """`x` in float32 at least: sums over many tokens are coarse, or too large, in half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
