"""L2 normalization, y = x / |x|, whose gradient takes half as many passes over memory as PyTorch's."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from cat.ops.common import Operation

EPSILON = 1e-12
"""Smallest divisor in float32, float64 and bfloat16. float16 cannot represent it."""


def l2_normalize(x: Float[Tensor, "*vectors C"]) -> Float[Tensor, "*vectors C"]:
    """Divide `x` by its L2 norm along the last axis.

    The reference implementation is `torch.nn.functional.normalize`. It differs in half precision, where it returns NaN for a
    vector of zeros and this function returns zeros.
    """
    return _L2Normalize.call(x)[0]


def min_norm(dtype: torch.dtype) -> float:
    """Smallest divisor in `dtype`."""
    return max(EPSILON, torch.finfo(dtype).tiny)


class _L2Normalize(Operation):
    """y = x / |x|, with the gradient (g - y <y, g>) / |x|."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the normalized vectors and their divisors."""
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(min_norm(x.dtype))
        return x / norm, norm

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor | None, _: None) -> Tensor | None:
        if gradient is None:
            return None
        y, norm = ctx.saved_tensors
        # A vector shorter than the smallest divisor is divided by a constant, so its gradient has no second term.
        radial = (gradient * y).sum(-1, keepdim=True) * (norm > min_norm(y.dtype))
        return torch.addcmul(gradient, y, radial, value=-1) / norm
