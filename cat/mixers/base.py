"""What every mixer is: a map of each token alone, then what makes the tokens of a sequence see each other, causally."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cat.types import Hidden, Positions


@dataclass(frozen=True)
class Cache:
    """What is needed of the tokens read so far to go on with those that follow."""

    length: int = 0
    """Tokens read so far."""
    state: Mapping[str, Tensor] = field(default_factory=dict)
    """By name; nothing before the first token."""


class Mixer(nn.Module, ABC):
    """Maps (B, L, D) to (B, L, D) causally; with `at`, only those positions of it are computed: (B, A, D).

    The two halves are apart because a model calls them apart: a token's projection may be looked up instead of computed.
    """

    def forward(self, x: Hidden, positions: Positions | None = None) -> Float[Tensor, "B _ D"]:
        return self.mix(self.project(x), positions)

    @abstractmethod
    def project(self, x: Float[Tensor, "*tokens D"]) -> Float[Tensor, "*tokens P"]:
        """All that is computed of one token without a look at the others."""

    @abstractmethod
    def mix(self, projected: Float[Tensor, "B L P"], positions: Positions | None = None) -> Float[Tensor, "B _ D"]:
        """The output at every position, or at positions `at`, of projected tokens."""

    def step(
        self, projected: Float[Tensor, "B L P"], cache: Cache, *, last: bool = False
    ) -> tuple[Float[Tensor, "B _ D"], Cache]:
        """The outputs of projected tokens that follow upon those of `memory`, and the memory of all of them.

        The outputs, of the last token alone where `last` says so, are what `combine` makes of the whole sequence. What is kept
        is right for every mixer, and more than most need: the projections of all tokens.
        """
        whole = append_to_cache(cache, "projected", projected, dim=1)
        length = whole.shape[1]
        first = length - 1 if last else cache.length
        later = torch.arange(first, length, device=whole.device).expand(len(whole), -1)
        return self.mix(whole, later if first else None), Cache(length, {"projected": whole})


def last_tokens(x: Float[Tensor, "*batch L C"], count: int) -> Float[Tensor, "*batch _ C"]:
    """The last `count` rows, or all where there are fewer."""
    return x[..., max(0, x.shape[-2] - count) :, :]


def append_to_cache(cache: Cache, name: str, x: Float[Tensor, "*shape"], *, dim: int) -> Float[Tensor, "*longer"]:
    """`x` behind what is kept under `name`."""
    return torch.cat([cache.state[name], x], dim=dim) if name in cache.state else x
