"""Causal convolution as a product with a Toeplitz matrix: y = T x with T[i, i - j] = F_j."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from cat.types import ChannelKernel, HeadMixingKernel, Heads, InputHeads


def toeplitz(kernel: Float[Tensor, "*rows W"], length: int) -> Float[Tensor, "*rows L L"]:
    """Return the matrices T with T[..., i, i - j] = kernel[..., j], for W at most `length`."""
    # Pad each kernel to 0 .. 0, F_0 .. F_{W-1}, 0 .. 0. Its windows, one step apart and reversed, are the rows of T.
    padded = F.pad(kernel, (length - 1, length - kernel.shape[-1]))
    return padded.unfold(-1, length, 1).flip(-1)


def filter_heads_toeplitz(x: Heads, kernel: ChannelKernel) -> Heads:
    return toeplitz(kernel[:, 0], x.shape[2]) @ x


def filter_channels_toeplitz(x: Heads, kernel: ChannelKernel) -> Heads:
    return (toeplitz(kernel, x.shape[2]) @ x.permute(1, 3, 2, 0)).permute(3, 0, 2, 1)


def mix_toeplitz(x: InputHeads, kernel: HeadMixingKernel) -> Heads:
    # One matrix over heads and tokens: (H L) x (G L).
    matrix = toeplitz(kernel, x.shape[2]).transpose(1, 2).flatten(2).flatten(0, 1)
    return (matrix @ x.flatten(1, 2)).unflatten(1, (-1, x.shape[2]))
