"""The axis that torch.vmap maps over, folded into another one: many calls of an operation of our own become one larger call."""

from jaxtyping import Shaped
from torch import Tensor


def fold(x: Shaped[Tensor, "*shape"], mapped: int | None, size: int, *, into: int) -> Shaped[Tensor, "*folded"]:
    """`x` without its axis `mapped`, of `size`, and with as many times more along axis `into`; None: the same `x` every time."""
    x = x.expand(size, *x.shape) if mapped is None else x.movedim(mapped, 0)
    return x.movedim(0, into).flatten(into, into + 1)
