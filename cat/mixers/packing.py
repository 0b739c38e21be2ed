"""Padded batches and packed documents: each document is computed as a row of its own.

A document is a sequence that attends to no other: the tokens of a row without its padding, or consecutive tokens with the same
segment id. Every mixer is causal: if a row starts with a document, the outputs there depend on nothing else. Mixers therefore
need no masks. Documents of similar length are rows of the same call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from cat.ops.common import Operation
from cat.ops.position import gather_positions, is_padding
from cat.types import Positions

MAX_PADDING = 1 / 8
"""Maximum share of padding in one call. With 1/4, linear attention took 1.2 times as long as without packing, with 1/8 1.1."""
MIN_PADDING = 128
"""Tokens of padding that cost less than another call: fewer are always accepted."""

Inputs = ParamSpec("Inputs")
Output = TypeVar("Output")
Mix = Callable[[Float[Tensor, "B L P"], Positions | None], Float[Tensor, "B _ D"]]
Documents = Int[Tensor, " N"]
"""A number for each document."""


@dataclass(frozen=True)
class Packing:
    """Documents of a batch of (B, L) tokens."""

    is_token: Bool[Tensor, "B L"] | None
    """Whether a token is in a document; None if all are."""
    positions: Int[Tensor, "B L"]
    """Position of each token in its document; 0 at padding."""
    longest: int
    """Number of tokens of the longest document."""
    rows: Rows | None
    """Rows in which the documents are computed; None if each is the start of a row of the batch already."""

    def clear(self, x: Shaped[Tensor, "B L *D"]) -> Shaped[Tensor, "B L *D"]:
        """Overwrite padding with zeros: a NaN there would reach the gradients of weights, because 0 times NaN is NaN."""
        return x if self.is_token is None else x.masked_fill(unsqueeze_like(~self.is_token, x), 0)

    def mix(self, mix: Mix, projected: Float[Tensor, "B L P"], positions: Positions | None = None) -> Float[Tensor, "B _ D"]:
        """Apply the `mix` of a mixer to each document. The outputs of padding are zero."""
        if self.rows is not None:
            return gather_positions(self.rows.mix(mix, projected), positions)
        return self.clear_at(mix(projected, positions), positions)

    def clear_at(self, y: Float[Tensor, "B _ D"], positions: Positions | None) -> Float[Tensor, "B _ D"]:
        """Overwrite the outputs of padding with zeros; `y` has all outputs or those at `positions`."""
        if self.is_token is None:
            return y
        is_token = self.is_token if positions is None else self.is_token.gather(1, positions)
        return y.masked_fill(~is_token[..., None], 0)


@dataclass(frozen=True)
class Rows:
    """Documents as the starts of rows of different lengths, with S places in all, for T = B L tokens.

    The rows of a group have the same length and are computed in one call. A row continues with the last token of its document,
    because not every `mix` may accept zeros.
    """

    groups: list[tuple[int, int]]
    """Number of rows and their length, for each group."""
    token: Int[Tensor, " S"]
    """Token at each place, as its index among all T."""
    place: Int[Tensor, " T"]
    """Place of each token; 0 at padding."""
    padding: Int[Tensor, " _"]
    """Tokens without a place."""
    unused: Int[Tensor, " _"]
    """Places whose output no token uses."""

    def mix(self, mix: Mix, projected: Float[Tensor, "B L P"]) -> Float[Tensor, "B L D"]:
        x = _Move.apply(projected.flatten(0, 1), self.token, None, self.place, self.padding)
        parts = x.split([rows * length for rows, length in self.groups])
        outputs = [mix(part.unflatten(0, group), None).flatten(0, 1) for part, group in zip(parts, self.groups, strict=True)]
        y = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
        return _Move.apply(y, self.place, self.padding, self.token, self.unused).unflatten(0, projected.shape[:2])


@dataclass(frozen=True)
class Prompts:
    """Prompts of unequal length, moved to the ends of their rows."""

    padding: Int[Tensor, " B"]
    """Number of tokens before each prompt."""
    column: Int[Tensor, "B L"]
    """Column from which each token comes."""

    def align(self, x: Shaped[Tensor, "B L *D"]) -> Shaped[Tensor, "B L *D"]:
        """Move prompts to the ends of their rows, with zeros before them."""
        x = x.gather(1, unsqueeze_like(self.column, x).expand_as(x))
        return x.masked_fill(unsqueeze_like(is_padding(self.padding, x.shape[1]), x), 0)

    def restore(self, y: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
        """Move outputs to the columns from which their tokens come."""
        return y.gather(1, unsqueeze_like(self.column.argsort(dim=1), y).expand_as(y))


def pack(x: Shaped[Tensor, "B L *D"], attention_mask: Tensor | None, segment_ids: Tensor | None) -> Packing | None:
    """Find the documents of the tokens `x`; None if each row is one document.

    `attention_mask` (B, L) is 1 or True at tokens, and 0 or False at padding on the left or on the right. `segment_ids` (B, L)
    are integers: consecutive tokens of a row with the same id are one document.

    Raises ValueError if both are given, or if one has the wrong shape, dtype or values.
    """
    if attention_mask is None and segment_ids is None:
        return None
    return _uncompiled(_pack)(x, attention_mask, segment_ids)


def _pack(x: Shaped[Tensor, "B L *D"], attention_mask: Tensor | None, segment_ids: Tensor | None) -> Packing | None:
    if attention_mask is not None and segment_ids is not None:
        raise ValueError("attention_mask and segment_ids are both given. Fix: give segment_ids only, with one id for padding")
    if attention_mask is not None:
        start, length = _unpadded(x, attention_mask)
    else:
        assert segment_ids is not None
        start, length = _segments(x, segment_ids)
    rows, columns = x.shape[:2]
    padded = int(length.sum()) < rows * columns
    if not padded and len(length) == rows:
        return None
    rank = _rank(length)
    token = start.repeat_interleave(length) + rank
    positions = torch.zeros(rows * columns, dtype=torch.long).index_copy(0, token, rank)
    is_token = torch.zeros(rows * columns, dtype=torch.bool).index_fill(0, token, True)
    return Packing(
        is_token=is_token.view(rows, columns).to(x.device) if padded else None,
        positions=positions.view(rows, columns).to(x.device),
        longest=int(length.max()) if len(length) else 0,
        rows=_in_rows(start, length, is_token, x.device) if bool((start % columns).any()) else None,
    )


def align_prompts(x: Shaped[Tensor, "B L *D"], attention_mask: Tensor, cached: int = 0) -> Prompts | None:
    """Find the prompts of the tokens `x`; None if there is no padding.

    Padding is on the left or on the right. Raises ValueError if the mask has the wrong shape, dtype or values, if a row has no
    token, or if tokens are `cached` already.
    """
    if cached:
        raise ValueError(f"attention_mask needs an empty cache, not one of {cached} tokens: only a prompt has padding")
    return _uncompiled(_align_prompts)(x, attention_mask)


def _align_prompts(x: Shaped[Tensor, "B L *D"], attention_mask: Tensor) -> Prompts | None:
    start, length = _unpadded(x, attention_mask)
    rows, columns = x.shape[:2]
    if len(length) < rows:
        raise ValueError(f"attention_mask has no token in row {(attention_mask == 0).all(1).nonzero()[0].item()}")
    if bool((length == columns).all()):
        return None
    end = start % columns + length
    return Prompts((columns - length).to(x.device), ((torch.arange(columns) + end[:, None]) % columns).to(x.device))


def unsqueeze_like(x: Shaped[Tensor, "B L"], like: Shaped[Tensor, "B L *D"]) -> Shaped[Tensor, "B L *_"]:
    """Append axes of size 1, so that `x` broadcasts to `like`."""
    return x.view(*x.shape, *[1] * (like.dim() - 2))


def _uncompiled(function: Callable[Inputs, Output]) -> Callable[Inputs, Output]:
    """Exclude `function` from compiled graphs: its results have sizes that depend on data."""
    return cast(Callable[Inputs, Output], torch.compiler.disable(function)) if torch.compiler.is_compiling() else function


def _unpadded(x: Tensor, attention_mask: Tensor) -> tuple[Documents, Documents]:
    """Return start and length of the tokens of each row that has some. Starts count all tokens of the batch."""
    mask = _on_cpu(x, attention_mask, "attention_mask")
    if bool(((mask != 0) & (mask != 1)).any()):
        raise ValueError("attention_mask has other values than 0 and 1")
    start, length = _runs(mask)
    tokens = mask.flatten()[start] != 0
    start, length = start[tokens], length[tokens]
    if len(again := _repeated(start // mask.shape[1])):
        raise ValueError(f"attention_mask has padding between the tokens of row {again[0]}; it must be on the left or right")
    return start, length


def _segments(x: Tensor, segment_ids: Tensor) -> tuple[Documents, Documents]:
    """Return start and length of each segment. Starts count all tokens of the batch."""
    ids = _on_cpu(x, segment_ids, "segment_ids")
    start, length = _runs(ids)
    if len(again := _repeated(torch.stack([start // ids.shape[1], ids.flatten()[start].long()], dim=1))):
        row, segment = again[0].tolist()
        raise ValueError(f"segment_ids has {segment} again after another id in row {row}. Fix: one id per document of a row")
    return start, length


def _on_cpu(x: Tensor, given: Tensor, name: str) -> Tensor:
    """Return `given` on the CPU. Raises ValueError unless it has one boolean or integer per token."""
    if given.shape != x.shape[:2]:
        raise ValueError(f"{name} has shape {tuple(given.shape)}, not {tuple(x.shape[:2])}, one value per token")
    if given.is_floating_point() or given.is_complex():
        raise ValueError(f"{name} has dtype {given.dtype}, not bool or an integer")
    return given.cpu()


def _runs(ids: Shaped[Tensor, "B L"]) -> tuple[Documents, Documents]:
    """Return start and length of each run of equal values in a row."""
    start = F.pad(ids[:, 1:] != ids[:, :-1], (1, 0), value=True).flatten().nonzero()[:, 0]
    return start, start.diff(append=start.new_tensor([ids.numel()]))


def _repeated(x: Int[Tensor, "N ..."]) -> Int[Tensor, "_ ..."]:
    """Return the elements along the first axis that occur more than once."""
    values, counts = x.unique(dim=0, return_counts=True)
    return values[counts > 1]


def _in_rows(start: Documents, length: Documents, is_token: Bool[Tensor, " T"], device: torch.device) -> Rows:
    """Give each document a row, in groups of similar length."""
    length, order = length.sort(descending=True, stable=True)
    groups = _group(length.tolist())
    size = torch.tensor([longest for rows, longest in groups for _ in range(rows)])
    column = _rank(size)
    own = column < length.repeat_interleave(size)
    token = start[order].repeat_interleave(size) + torch.minimum(column, (length - 1).repeat_interleave(size))
    place = torch.zeros(len(is_token), dtype=torch.long).index_copy(0, token[own], own.nonzero()[:, 0])
    padding, unused = (~is_token).nonzero()[:, 0], (~own).nonzero()[:, 0]
    return Rows(groups, token.to(device), place.to(device), padding.to(device), unused.to(device))


def _rank(sizes: Documents) -> Int[Tensor, " S"]:
    """Count 0, 1, .. up to each size in turn."""
    return torch.arange(int(sizes.sum())) - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)


def _group(lengths: list[int]) -> list[tuple[int, int]]:
    """Split rows, the longest first, into groups with little padding. Returns number of rows and their length, for each group."""
    groups: list[tuple[int, int]] = []
    rows, longest, used = 0, lengths[0], 0
    for length in lengths:
        size = (rows + 1) * longest
        if size - used - length > max(MAX_PADDING * size, MIN_PADDING):
            groups.append((rows, longest))
            rows, longest, used = 0, length, 0
        rows, used = rows + 1, used + length
    return [*groups, (rows, longest)]


class _Move(Operation):
    """Copy rows of (M, C) to (N, C), each at most once as far as gradients are concerned.

    `source` has the row that each of the N rows copies, `target` the inverse for the M rows. `empty` are rows without a source,
    `unused` rows without a target: they are set to zero, and so are their gradients. Both gathers copy whole rows, which is
    faster than to add them, and deterministic.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, source: Tensor, empty: Tensor | None, target: Tensor, unused: Tensor | None) -> Tensor:
        y = x.index_select(0, source)
        return y if empty is None else y.index_fill_(0, empty, 0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        source, empty, target, unused = ctx.saved_tensors
        return _Move.apply(gradient, target, unused, source, empty), None, None, None, None
