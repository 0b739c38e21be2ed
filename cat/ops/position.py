"""Taking what stands at a position, and position schemes.

They are rotary (arXiv 2104.09864), ALiBi (2108.12409), sinusoidal and learned (1706.03762), none.

Rotary and ALiBi act inside attention, after the filters; sinusoidal and learned vectors are added to the embedding.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cat.types import Heads, Positions


def gather_positions(x: Float[Tensor, "B *H L C"], positions: Positions | None) -> Float[Tensor, "B *H A C"]:
    """What stands at positions `at` of each sequence; all of it for None."""
    if positions is None:
        return x
    index = positions.view(len(positions), *[1] * (x.dim() - 3), positions.shape[1], 1)
    return x.gather(-2, index.expand(*x.shape[:-2], -1, x.shape[-1]))


def rotate(x: Heads, base: float = 10_000.0, *, start: int = 0, step: int = 1, positions: Positions | None = None) -> Heads:
    """Turns the pair of channels (c, c + C/2) of token i by the angle i * base^(-2c/C).

    The first row is token `start`, the next one `step` tokens later; or the rows are tokens `at` of each sequence.
    """
    length, channels = x.shape[2:]
    frequency = base ** (-torch.arange(0, channels, 2, device=x.device, dtype=torch.float64) / channels)
    place = torch.arange(start, start + length * step, step, device=x.device) if positions is None else positions[:, None]
    angle = place[..., None] * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


def alibi_bias(heads: int, queries: Int[Tensor, "*A"], length: int, like: Tensor) -> Float[Tensor, "H *A L"]:
    """What ALiBi adds to the score of query i and key j < L: -slope * (i - j), -inf where j > i; slopes 2^(-8h/H), h = 1..H.

    Of the queries at positions `queries`, each below L.
    """
    slope = 2.0 ** (-8.0 * torch.arange(1, heads + 1, device=like.device, dtype=torch.float64) / heads)
    after = torch.arange(1 - length, length, device=like.device)  # j - i
    bias = (slope[:, None] * after).masked_fill(after > 0, float("-inf")).to(like.dtype)
    # Row i is a window of these numbers: there are few to compute.
    return bias.unfold(1, length, 1)[:, length - 1 - queries]


def sinusoidal(length: int, width: int, like: Tensor, *, start: int = 0) -> Float[Tensor, "L D"]:
    """Channel 2c of token i is sin(i * 10000^(-2c/D)), channel 2c + 1 the cosine; the first row is token `start`."""
    channel = torch.arange(width, device=like.device, dtype=torch.float64)
    frequency = 10_000.0 ** (-(channel - channel % 2) / width)
    angle = torch.arange(start, start + length, device=like.device, dtype=torch.float64)[:, None] * frequency
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos()).to(like.dtype)
