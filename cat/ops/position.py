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


def rotate(
    x: Heads,
    base: float = 10_000.0,
    scale: float = 1.0,
    *,
    start: int = 0,
    step: int = 1,
    positions: Positions | None = None,
) -> Heads:
    """Rotate the channel pair (c, c + C/2) of token i by the angle i / scale * base^(-2c/C).

    Token i of `x` is at position `start` + i * `step` of its sequence, or at `positions[:, i]`. `scale` interpolates positions
    (arXiv 2306.15595).
    """
    length, channels = x.shape[2:]
    frequency = base ** (-torch.arange(0, channels, 2, device=x.device, dtype=torch.float64) / channels) / scale
    index = torch.arange(start, start + length * step, step, device=x.device) if positions is None else positions[:, None]
    angle = index[..., None] * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


def alibi_slopes(heads: int, like: Tensor) -> Float[Tensor, " H"]:
    """Return the slope of ALiBi of each head, in float64, as the authors' code does. `like` gives the device.

    If `heads` is a power of two, head h = 1..H has the slope 2^(-8h/H). Otherwise the first heads have the slopes of the next
    lower power of two, and the others every second slope of twice that number.
    """
    power = 1 << heads.bit_length() - 1
    first = torch.arange(1, power + 1, device=like.device, dtype=torch.float64) / power
    others = (torch.arange(heads - power, device=like.device, dtype=torch.float64) + 0.5) / power
    return 2.0 ** (-8 * torch.cat([first, others]))


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
