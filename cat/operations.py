"""What operations of our own, with gradients by hand, have in common."""

import inspect
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor


class Operation(torch.autograd.Function):
    """One whose `forward` is inspected once: PyTorch does so at every call, a fiftieth of a millisecond each."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        vars(cls)["forward"].__func__.__signature__ = inspect.signature(cls.forward)


def fold(x: Shaped[Tensor, "*shape"], mapped: int | None, size: int, *, into: int) -> Shaped[Tensor, "*folded"]:
    """`x` without its axis `mapped`, of `size`, and with as many times more along axis `into`; None: the same `x` every time.

    Many calls that torch.vmap maps over that axis become one larger call.
    """
    x = x.expand(size, *x.shape) if mapped is None else x.movedim(mapped, 0)
    return x.movedim(0, into).flatten(into, into + 1)
