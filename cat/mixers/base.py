"""Interface of every mixer: project each token, then mix tokens causally."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cat.types import Hidden, Positions


@dataclass(frozen=True)
class Cache:
    """State of a mixer after the tokens so far, such as a KV cache."""

    length: int = 0
    """Tokens so far."""
    state: Mapping[str, Tensor] = field(default_factory=dict)
    """Tensors by name; empty before the first token."""


class Mixer(nn.Module, ABC):
    """Map (B, L, D) to (B, L, D) causally.

    With `positions`, compute only the outputs there: (B, A, D). `project` and `mix` are separate because a model may look up a
    token's projection instead of computing it.
    """

    def forward(self, x: Hidden, positions: Positions | None = None) -> Float[Tensor, "B _ D"]:
        return self.mix(self.project(x), positions)

    @abstractmethod
    def project(self, x: Float[Tensor, "*tokens D"]) -> Float[Tensor, "*tokens P"]:
        """Compute everything that depends on one token only."""

    @abstractmethod
    def mix(self, projected: Float[Tensor, "B L P"], positions: Positions | None = None) -> Float[Tensor, "B _ D"]:
        """Return the outputs for projected tokens, at every position or at `positions`."""

    def step(
        self, projected: Float[Tensor, "B L P"], cache: Cache, *, last: bool = False
    ) -> tuple[Float[Tensor, "B _ D"], Cache]:
        """Return the outputs of the tokens after those in `cache`, and the new cache.

        The outputs equal those of `mix` on the whole sequence; `last`: only the last token's output. This default works for
        every mixer. It caches the projections of all tokens, which is more than most mixers need.
        """
        whole = append_to_cache(cache, "projected", projected, dim=1)
        length = whole.shape[1]
        first = length - 1 if last else cache.length
        new = torch.arange(first, length, device=whole.device).expand(len(whole), -1)
        return self.mix(whole, new if first else None), Cache(length, {"projected": whole})


def last_tokens(x: Float[Tensor, "*batch L C"], count: int) -> Float[Tensor, "*batch _ C"]:
    """Return the last `count` tokens, or all tokens if there are fewer."""
    return x[..., max(0, x.shape[-2] - count) :, :]


def append_to_cache(cache: Cache, name: str, x: Float[Tensor, "*shape"], *, dim: int) -> Float[Tensor, "*longer"]:
    """Concatenate the cached tensor `name`, if there is one, and `x` along `dim`."""
    return torch.cat([cache.state[name], x], dim=dim) if name in cache.state else x
