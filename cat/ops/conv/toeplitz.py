"""Causal convolution as a product with a Toeplitz matrix."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from cat.types import ChannelKernel, HeadMixingKernel, Heads, Sources


def toeplitz(kernel: Float[Tensor, "*rows W"], length: int) -> Float[Tensor, "*rows L L"]:
    """The matrices T with T[..., i, i - j] = taps[..., j]: filters as causal linear maps."""
    # Windows of [0 .. 0, F_0 .. F_{W-1}, 0 .. 0], each one step further than the last; reversed, they are the rows of T.
    padded = F.pad(kernel, (length - 1, length - kernel.shape[-1]))
    return padded.unfold(-1, length, 1).flip(-1)


def filter_heads_toeplitz(x: Heads, kernel: ChannelKernel) -> Heads:
    return toeplitz(kernel[:, 0], x.shape[2]) @ x


def filter_channels_toeplitz(x: Heads, kernel: ChannelKernel) -> Heads:
    return (toeplitz(kernel, x.shape[2]) @ x.permute(1, 3, 2, 0)).permute(3, 0, 2, 1)


def mix_toeplitz(x: Sources, kernel: HeadMixingKernel) -> Heads:
    # One matrix over heads and tokens: (H L) x (G L).
    matrix = toeplitz(kernel, x.shape[2]).transpose(1, 2).flatten(2).flatten(0, 1)
    return (matrix @ x.flatten(1, 2)).unflatten(1, (-1, x.shape[2]))
