"""Token shift: m x_t + (1 - m) x_{t-1} per channel, with its own m for each projection (RWKV, arXiv 2305.13048)."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from cat.mixers.base import last_tokens
from cat.ops.common import set_values
from cat.types import Hidden


class TokenShift(nn.Module):
    """Weights m of the current token, for the inputs of q, k and v.

    They start as in the first layer of the authors' RWKV-4, because a mixer does not know its depth: m rises from 0 to 1 over the
    channels, and is the square root of that for the queries, in place of RWKV's receptance. The value is that of a channel's
    middle, (c + 1/2) / D and not c / D, so that m = 0 drops no channel. With m = 1 nothing is shifted.
    """

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(3, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize the weights."""
        ramp = (torch.arange(self.weight.shape[1]) + 0.5) / self.weight.shape[1]
        set_values(self.weight, torch.stack([ramp.sqrt(), ramp, ramp]))

    def inputs(self, x: Float[Tensor, "*tokens D"]) -> list[Float[Tensor, "T *tokens D"]]:
        """Return the inputs of q, k and v, each stacked: the part m x for the token itself, and (1 - m) x for the next token."""
        return [torch.stack([weight * x, (1 - weight) * x]) for weight in self.weight.to(x.dtype)]

    @staticmethod
    def add(now: Hidden, for_next: Hidden, before: Float[Tensor, "B 1 D"] | None = None) -> tuple[Hidden, Float[Tensor, "B 1 D"]]:
        """Add to each token the part from its predecessor, and return the part for the next token.

        `before` is the part from the token before the first one; None: zero.
        """
        shifted = F.pad(for_next, (0, 0, 1, 0)) if before is None else torch.cat([before, for_next], dim=1)
        return now + shifted[:, :-1], last_tokens(for_next, 1)
