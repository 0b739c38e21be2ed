"""Landmarks in the random context model: weights that retrieve the right block, and how often they fail."""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from cat.mixers.filters import ExplicitFilter
from cat.mixers.landmark.config import LandmarkConfig
from cat.mixers.landmark.layer import LandmarkAttention
from cat.types import Hidden


@torch.no_grad()
def block_retrieval(*, width: int, length: int, block: int, kernel: Float[Tensor, " W"] | None = None) -> LandmarkAttention:
    """Return landmark attention whose landmarks are the sums of their blocks.

    With `kernel`, a landmark is the convolution of the tokens with it, at the end of the block.
    """
    kernel = torch.ones(block) if kernel is None else kernel
    config = LandmarkConfig(heads=1, conv_k=len(kernel), block=block, top=1)
    with torch.random.fork_rng(devices=[]):
        mixer = LandmarkAttention(config, width=width, length=length)
    for linear in (mixer.q_proj, mixer.k_proj, mixer.v_proj, mixer.o_proj):
        linear.weight.copy_(torch.eye(width))
    cast(ExplicitFilter, mixer.filters["k"]).kernel.copy_(kernel)
    return mixer


def random_context(
    *, width: int, length: int, block: int, count: int, generator: torch.Generator
) -> tuple[Hidden, Int[Tensor, " B"]]:
    """Draw from the random context model: return `count` sequences, and the position of a copy of the last token in each.

    Tokens are N(0, I / d); the last token has norm 1. Its copy is at a random position in the blocks before its own.
    """
    x = torch.randn(count, length, width, generator=generator) / math.sqrt(width)
    x[:, -1] = F.normalize(x[:, -1], dim=-1)
    earlier = (length - 1) // block * block
    position = torch.randint(earlier, (count,), generator=generator)
    x[torch.arange(count), position] = x[:, -1]
    return x, position


def wrong_block_bound(width: int, length: int, block: int) -> float:
    """Return the bound (L / B) exp(-d / (2 (2 B - 1))) / 2 on the probability that landmarks choose a wrong block.

    For a box filter in the random context model.
    """
    return length / block / 2 * math.exp(-width / (2 * (2 * block - 1)))


def sufficient_width(length: int, block: int, epsilon: float) -> int:
    """Return the width d = 4 B log(L / (B epsilon)), rounded up, for which `wrong_block_bound` is at most `epsilon` / 2."""
    return math.ceil(4 * block * math.log(length / (block * epsilon)))
