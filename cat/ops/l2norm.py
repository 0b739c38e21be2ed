"""Vectors of unit length, whose gradient takes half as many passes over memory as PyTorch's own."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from cat.ops.common import Operation

LEAST = 1e-12
"""What a shorter vector is divided by, but in half precision, which has no number as small."""


def l2_normalize(x: Float[Tensor, "*vectors C"]) -> Float[Tensor, "*vectors C"]:
    """`x` divided by its length along the last axis: `torch.nn.functional.normalize`, which is its twin.

    But for half precision, in which that makes nan of zeros.
    """
    return _Unit.apply(x)[0]


def min_norm(dtype: torch.dtype) -> float:
    """What is divided by at least."""
    return max(LEAST, torch.finfo(dtype).tiny)


class _Unit(Operation):
    """y = x / |x| and its gradient (g - y <y, g>) / |x|."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        """The vectors, and what they were divided by."""
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(min_norm(x.dtype))
        return x / length, length

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: None) -> Tensor:
        y, length = ctx.saved_tensors
        along = (gradient * y).sum(-1, keepdim=True) * (length > min_norm(y.dtype))  # a shorter vector is divided by a constant
        return torch.addcmul(gradient, y, along, value=-1) / length
