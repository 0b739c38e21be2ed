"""What triton_backend.py and numba_backend.py compute, of the same tensors, by PyTorch's own operations: one pass over x a tap.

For other devices than theirs, and for torch.compile, which fuses the passes.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from cat.types import Replicated, StackedHeads, StackedKernel


def filter_stacks(x: StackedHeads, kernel: StackedKernel, dilation: int) -> StackedHeads:
    """y_i = sum_{j < W} taps_j x_{i - j dilation}, with zeros before the first token."""
    first, *others = _rows(kernel)
    y = x * first
    for j, row in enumerate(others, 1):
        y[..., j * dilation :, :].addcmul_(_before(x, j * dilation), row)
    return y


def filter_gradients(
    x: StackedHeads, kernel: StackedKernel, gradients: Sequence[Replicated], dilation: int
) -> tuple[StackedHeads, StackedKernel]:
    """Those of x and of the taps, given one of the outcome of each group."""
    of_y = torch.stack(list(gradients), dim=1)
    first, *others = _rows(kernel)
    of_x, of_taps = of_y * first, [_sum(of_y * x, kernel)]
    for j, row in enumerate(others, 1):
        later = of_y[..., j * dilation :, :]
        _before(of_x, j * dilation).addcmul_(later, row)
        of_taps.append(_sum(later * _before(x, j * dilation), kernel))
    return of_x.to(x.dtype), torch.stack(of_taps, dim=-1).to(kernel.dtype)


def _rows(kernel: StackedKernel) -> list[Tensor]:
    """What each tap multiplies the channels by, (R, G, 1, H, 1, C)."""
    return [row[:, :, None, :, None] for row in kernel.unbind(-1)]


def _before(x: StackedHeads, shift: int) -> Float[Tensor, "R G B H _ C"]:
    """What so many later tokens read: all but the last tokens."""
    return x[..., : max(0, x.shape[4] - shift), :]


def _sum(products: Float[Tensor, "R G B H _ C"], kernel: StackedKernel) -> Tensor:
    """Over sequences and tokens, and over channels that share their taps."""
    return products.sum((2, 4), dtype=torch.promote_types(kernel.dtype, torch.float32)).sum_to_size(kernel.shape[:-1])
