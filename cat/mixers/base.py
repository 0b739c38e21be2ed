"""Interface of every mixer: project each token, then mix tokens causally."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cat.mixers.packing import pack
from cat.ops.position import gather_positions, is_padding
from cat.types import Hidden, Positions


@dataclass(frozen=True)
class Cache:
    """State of a mixer after the tokens so far, such as a KV cache.

    The first axis of every tensor is the batch. For beam search, `reorder` selects the sequences to continue; a model has one
    cache per block.
    """

    length: int = 0
    """Tokens so far, padding included."""
    state: Mapping[str, Tensor] = field(default_factory=dict)
    """Tensors by name; empty before the first token."""
    padding: Int[Tensor, " B"] | None = None
    """How many of the first tokens of each sequence are padding; None if there is none. If `length` is 0, of the next tokens."""

    def reorder(self, indices: Int[Tensor, " N"]) -> "Cache":
        """Return the cache of the sequences `indices` of the batch, in this order. An index may occur several times."""
        state = {name: x.index_select(0, indices) for name, x in self.state.items()}
        return Cache(self.length, state, None if self.padding is None else self.padding.index_select(0, indices))

    def after(self, tokens: int, state: Mapping[str, Tensor]) -> "Cache":
        """Return the cache after `tokens` more tokens."""
        return replace(self, length=self.length + tokens, state=state)

    def valid(self, tokens: int) -> Bool[Tensor, "B K"] | None:
        """Return which of the first `tokens` tokens are not padding; None if all are."""
        return None if self.padding is None else ~is_padding(self.padding, tokens)

    def positions(self, tokens: int) -> Positions | None:
        """Return the positions of the next `tokens` tokens if there is padding, where they are negative; None otherwise."""
        if self.padding is None:
            return None
        return torch.arange(self.length, self.length + tokens, device=self.padding.device) - self.padding[:, None]

    def new_padding(self, tokens: int) -> Bool[Tensor, "B L"] | None:
        """Return which of the next `tokens` tokens are padding; None if none is. Only a prompt has padding."""
        return None if self.padding is None or self.length else is_padding(self.padding, tokens)


class Mixer(nn.Module, ABC):
    """Map (B, L, D) to (B, L, D) causally.

    With `positions`, compute only the outputs there: (B, A, D). `project` and `mix` are separate because a model may look up a
    token's projection instead of computing it.
    """

    supports_padding: ClassVar[bool] = False
    """Whether `step` considers the padding of a cache. Otherwise `step_padded` caches projections instead."""

    def forward(
        self,
        x: Hidden,
        positions: Positions | None = None,
        *,
        attention_mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
    ) -> Float[Tensor, "B _ D"]:
        """Return the outputs. With a mask, they equal the outputs of separate sequences: see `cat.mixers.packing.pack`.

        The outputs at padding are zero.
        """
        packing = pack(x, attention_mask, segment_ids)
        if packing is None:
            return self.mix(self.project(x), positions)
        return packing.mix(self.mix, self.project(packing.clear(x)), positions)

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
        positions = torch.arange(first, length, device=whole.device).expand(len(whole), -1)
        after = cache.after(projected.shape[1], {"projected": whole})
        if cache.padding is None:
            return self.mix(whole, positions if first else None), after
        # Move each sequence to the start of its row; the row continues with the last token.
        offset = cache.padding[:, None]
        moved = (torch.arange(length, device=whole.device) + offset).clamp(max=length - 1)
        whole, positions = gather_positions(whole, moved), positions - offset
        if first:
            return self.mix(whole, positions), after
        return gather_positions(self.mix(whole), positions.clamp(min=0)), after

    def step_padded(
        self, projected: Float[Tensor, "B L P"], cache: Cache, *, last: bool = False
    ) -> tuple[Float[Tensor, "B _ D"], Cache]:
        """Return the results of `step`, also for a cache with padding.

        The outputs of padding are zero.
        """
        if cache.padding is None:
            return self.step(projected, cache, last=last)
        padding = cache.new_padding(projected.shape[1])
        if padding is not None:
            projected = projected.masked_fill(padding[..., None], 0)
        y, after = (
            self.step(projected, cache, last=last) if self.supports_padding else Mixer.step(self, projected, cache, last=last)
        )
        if padding is not None and not last:
            y = y.masked_fill(padding[..., None], 0)
        return y, replace(after, padding=cache.padding)


def last_tokens(x: Float[Tensor, "*batch L C"], count: int) -> Float[Tensor, "*batch _ C"]:
    """Return the last `count` tokens, or all tokens if there are fewer."""
    return x[..., max(0, x.shape[-2] - count) :, :]


def append_to_cache(cache: Cache, name: str, x: Float[Tensor, "*shape"], *, dim: int) -> Float[Tensor, "*longer"]:
    """Concatenate the cached tensor `name`, if there is one, and `x` along `dim`."""
    return torch.cat([cache.state[name], x], dim=dim) if name in cache.state else x
