"""What every mixer is: a map of each token alone, then what makes the tokens of a sequence see each other, causally."""

from abc import ABC, abstractmethod

from jaxtyping import Float
from torch import Tensor, nn

from cat.types import Asked, Hidden


class Mixer(nn.Module, ABC):
    """Maps (B, L, D) to (B, L, D) causally; with `at`, only those positions of it are computed: (B, A, D).

    The two halves are apart because a model calls them apart: a token's projection may be looked up instead of computed.
    """

    def forward(self, x: Hidden, at: Asked | None = None) -> Float[Tensor, "B _ D"]:
        return self.combine(self.project(x), at)

    @abstractmethod
    def project(self, x: Float[Tensor, "*tokens D"]) -> Float[Tensor, "*tokens P"]:
        """All that is computed of one token without a look at the others."""

    @abstractmethod
    def combine(self, projected: Float[Tensor, "B L P"], at: Asked | None = None) -> Float[Tensor, "B _ D"]:
        """The output at every position, or at positions `at`, of projected tokens."""
