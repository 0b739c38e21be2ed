"""What cat/kernels.py computes on a GPU, of the same tensors, by PyTorch's own operations: one pass over the sequence a tap.

A few sequences at a time, so that after the first pass a core has them in its cache.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from cat.types import GroupedFilter, GroupedHeads, Heads, Replicated, StackedFilter, StackedHeads

NUMBERS_AT_ONCE = {"cpu": 1 << 17, "cuda": 1 << 24}
"""As many sequences at a time as have so many numbers: on a CPU because of its cache, on a GPU because of its memory."""

Sequences = Float[Tensor, "B L G H C"]


def filter_stacks(x: StackedHeads, taps: StackedFilter, dilation: int) -> StackedHeads:
    """y_i = sum_{j < W} taps_j x_{i - j dilation}, with zeros before the first token."""
    y = torch.empty_like(x, dtype=torch.promote_types(x.dtype, taps.dtype))
    for its_x, its_taps, its_y in zip(map(_tokens, x), taps, map(_tokens, y), strict=True):
        first, *others = _rows(its_taps, dilation, its_x)
        for some in _parts(its_x):
            own, out = its_x[some], its_y[some]
            torch.mul(own, first.row, out=out)
            for shift, row in others:
                out[:, shift:].addcmul_(own[:, :-shift], row)
    return y


def filter_gradients(
    x: StackedHeads, taps: StackedFilter, gradients: Sequence[Replicated], dilation: int
) -> tuple[StackedHeads, StackedFilter]:
    """Those of x and of the taps, given one of the outcome of each group."""
    of_x = torch.empty_like(x, dtype=torch.promote_types(gradients[0].dtype, taps.dtype))
    of_y = zip(*gradients, strict=True)
    of_taps = [_one_gradient(*rest, dilation) for rest in zip(map(_tokens, x), taps, of_y, map(_tokens, of_x), strict=True)]
    return of_x.to(x.dtype), torch.stack(of_taps).to(taps.dtype)


def _one_gradient(x: Sequences, taps: GroupedFilter, of_y: Sequence[Heads], of_x: Sequences, dilation: int) -> GroupedFilter:
    """Of one replica: that of the taps, that of x written to `of_x`."""
    first, *others = _rows(taps, dilation, x)
    parts = _parts(x)
    sums = x.new_zeros(len(taps[0, 0, 0]), *x[parts[0]].shape, dtype=torch.promote_types(taps.dtype, torch.float32))
    for some in parts:
        own, out = x[some], of_x[some]
        later = torch.stack([gradient[some].transpose(1, 2) for gradient in of_y], dim=2)
        torch.mul(later, first.row, out=out)
        products = sums[:, : len(own)]
        products[0].addcmul_(later, own)
        for total, (shift, row) in zip(products[1:], others, strict=True):
            out[:, :-shift].addcmul_(later[:, shift:], row)
            total[:, shift:].addcmul_(later[:, shift:], own[:, :-shift])
    return sums.sum((1, 2)).movedim(0, -1).sum_to_size(taps.shape)


class _Row(NamedTuple):
    shift: int
    """How many tokens back the tap is."""
    row: Float[Tensor, "G H C"]
    """What it multiplies each channel by."""


def _rows(taps: GroupedFilter, dilation: int, x: Sequences) -> list[_Row]:
    return [_Row(j * dilation, row.expand(x.shape[2:]).contiguous()) for j, row in enumerate(taps.unbind(-1))]


def _tokens(x: GroupedHeads) -> Sequences:
    return x.permute(1, 3, 0, 2, 4)


def _parts(x: Sequences) -> list[slice]:
    """All at once where a compiler would unroll them."""
    if torch.compiler.is_compiling():
        return [slice(None)]
    size = max(1, NUMBERS_AT_ONCE[x.device.type] // max(1, x.shape[1:].numel()))
    return [slice(start, start + size) for start in range(0, max(1, len(x)), size)]
