"""Position schemes: rotary (arXiv 2104.09864), ALiBi (2108.12409), sinusoidal and learned (1706.03762).

Rotary and ALiBi act inside attention, after the convolutions. Sinusoidal and learned vectors are added to the embedding.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cat.types import Heads, Positions


def gather_positions(x: Float[Tensor, "B *H L C"], positions: Positions | None) -> Float[Tensor, "B *H A C"]:
    """Select the tokens at `positions` of each sequence, or all tokens for None."""
    if positions is None:
        return x
    index = positions.view(len(positions), *[1] * (x.dim() - 3), positions.shape[1], 1)
    return x.gather(-2, index.expand(*x.shape[:-2], -1, x.shape[-1]))


def is_padding(padding: Int[Tensor, " B"], length: int) -> Bool[Tensor, "B L"]:
    """Whether each of the first `length` tokens is one of the `padding` first tokens of its row."""
    return torch.arange(length, device=padding.device) < padding[:, None]


def rotate(x: Heads, base: float = 10_000.0, *, start: int = 0, step: int = 1, positions: Positions | None = None) -> Heads:
    """Rotate the channel pair (c, c + C/2) of token i by the angle i * base^(-2c/C).

    Token i of `x` is at position `start` + i * `step` of its sequence, or at `positions[:, i]`.
    """
    length, channels = x.shape[2:]
    frequency = base ** (-torch.arange(0, channels, 2, device=x.device, dtype=torch.float64) / channels)
    index = torch.arange(start, start + length * step, step, device=x.device) if positions is None else positions[:, None]
    angle = index[..., None] * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


def alibi_bias(heads: int, queries: Int[Tensor, "*A"], length: int, like: Tensor) -> Float[Tensor, "H *A L"]:
    """Return the bias of ALiBi for the queries at positions `queries`, each below `length` L.

    For query i and key j < L it is -slope * (i - j), and -inf if j > i. Head h = 1..H has the slope 2^(-8h/H). `like` gives the
    dtype and the device.
    """
    slope = 2.0 ** (-8.0 * torch.arange(1, heads + 1, device=like.device, dtype=torch.float64) / heads)
    offset = torch.arange(1 - length, length, device=like.device)  # j - i
    bias = (slope[:, None] * offset).masked_fill(offset > 0, float("-inf")).to(like.dtype)
    # Each row of the bias is a window of these 2L - 1 values.
    return bias.unfold(1, length, 1)[:, length - 1 - queries]


def sinusoidal(
    length: int, width: int, like: Tensor, *, start: int = 0, positions: Int[Tensor, "B L"] | None = None
) -> Float[Tensor, "*#B L D"]:
    """Return the sinusoidal vectors of the `length` tokens from position `start` on, or of the tokens at `positions`.

    At position i, channel 2c is sin(i * 10000^(-2c/D)) and channel 2c + 1 its cosine. `like` gives the dtype and the device.
    """
    channel = torch.arange(width, device=like.device, dtype=torch.float64)
    frequency = 10_000.0 ** (-(channel - channel % 2) / width)
    index = torch.arange(start, start + length, device=like.device, dtype=torch.float64) if positions is None else positions
    angle = index[..., None] * frequency
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos()).to(like.dtype)
