"""Canon layers: x + conv(x), a residual causal convolution with one kernel per channel (arXiv 2512.17351).

A   the input of the mixer, after the norm          B   queries, keys and values, after the projection
C   the input of the MLP, after the norm            D   inside the MLP, before the activation; of SwiGLU both branches
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cat.mixers.base import last_tokens
from cat.ops.common import set_values
from cat.ops.conv.causal import filter_channels
from cat.types import Hidden


class Canon(nn.Module):
    """Map (B, L, D) to x + conv(x), causally: one kernel of `kernel_size` values per channel, no bias, no activation.

    The kernels start as in nn.Conv1d: uniform between -1 / sqrt(kernel_size) and 1 / sqrt(kernel_size).
    """

    def __init__(self, width: int, kernel_size: int = 4):
        super().__init__()
        self.kernel = nn.Parameter(torch.empty(width, kernel_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the kernels again."""
        bound = 1 / math.sqrt(self.kernel.shape[1])
        set_values(self.kernel, torch.empty(self.kernel.shape).uniform_(-bound, bound))

    def forward(self, x: Hidden) -> Hidden:
        return x + filter_channels(x[:, None], self.kernel[None].to(x.dtype)).squeeze(1)

    def step(self, x: Hidden, inputs: Float[Tensor, "B R D"] | None = None) -> tuple[Hidden, Float[Tensor, "B S D"]]:
        """Return the outputs of `x` after the tokens `inputs`, and the inputs to cache: the last `kernel_size` - 1.

        `inputs` is None before the first token. Padding before a sequence must be zero, in `x` and in `inputs`.
        """
        whole = x if inputs is None else torch.cat([inputs, x], dim=1)
        return last_tokens(self(whole), x.shape[1]), last_tokens(whole, self.kernel.shape[1] - 1)

    def extra_repr(self) -> str:
        return f"width={self.kernel.shape[0]}, kernel_size={self.kernel.shape[1]}"
