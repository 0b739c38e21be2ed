"""Direct causal convolution in PyTorch operations, one pass over x per kernel value: y_i = sum_{j < W} F_j x_{i - j dilation}.

It computes the same as triton_backend.py and numba_backend.py, for all other devices. It also serves torch.compile, which fuses
the passes.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from cat.types import MemberHeads, StackedHeads, StackedKernel


def filter_stacks(x: StackedHeads, kernel: StackedKernel, dilation: int) -> StackedHeads:
    """Convolve every group of every ensemble member with its own kernel."""
    first, *others = _kernel_values(kernel)
    length, reach = x.shape[4], len(others) * dilation
    # With zeros before the first token, no slice is cut off, and torch.export needs no branch for short sequences.
    padded, y = F.pad(x, (0, 0, reach, 0)), x * first
    for j, value in enumerate(others, 1):
        y = y.addcmul_(padded.narrow(4, reach - j * dilation, length), value)
    return y


def filter_gradients(
    x: StackedHeads, kernel: StackedKernel, gradients: Sequence[MemberHeads], dilation: int
) -> tuple[StackedHeads, StackedKernel]:
    """Return the gradients of x and of the kernel, given the gradient of each group's output."""
    grad_y = torch.stack(list(gradients), dim=1)
    first, *others = _kernel_values(kernel)
    grad_x, grad_kernel = grad_y * first, [_sum_to_kernel(grad_y * x, kernel)]
    for j, value in enumerate(others, 1):
        later = grad_y[..., j * dilation :, :]
        _drop_last(grad_x, j * dilation).addcmul_(later, value)
        grad_kernel.append(_sum_to_kernel(later * _drop_last(x, j * dilation), kernel))
    return grad_x.to(x.dtype), torch.stack(grad_kernel, dim=-1).to(kernel.dtype)


def _kernel_values(kernel: StackedKernel) -> list[Tensor]:
    """Return F_0, F_1, ..., each as (R, G, 1, H, 1, C)."""
    return [value[:, :, None, :, None] for value in kernel.unbind(-1)]


def _drop_last(x: StackedHeads, count: int) -> Float[Tensor, "R G B H _ C"]:
    """Return all tokens but the last `count`."""
    return x[..., : max(0, x.shape[4] - count), :]


def _sum_to_kernel(products: Float[Tensor, "R G B H _ C"], kernel: StackedKernel) -> Tensor:
    """Sum over sequences, tokens and the channels that share a kernel."""
    return products.sum((2, 4), dtype=torch.promote_types(kernel.dtype, torch.float32)).sum_to_size(kernel.shape[:-1])
