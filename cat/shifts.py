"""What cat/kernels.py computes on a GPU, of the same tensors, by PyTorch's own operations: one pass over the sequence a tap.

A few tokens at a time, of a few sequences if these are short, so that after the first pass a core has them in its cache.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from cat.types import GroupedFilter, GroupedHeads, Heads, Replicated, StackedFilter, StackedHeads

NUMBERS_AT_ONCE = {"cpu": 1 << 17, "cuda": 1 << 24}
"""In the tokens that are filtered at a time: on a CPU so few that they stay in its cache, on a GPU because of its memory."""

Sequences = Float[Tensor, "B L G H C"]


def filter_stacks(x: StackedHeads, taps: StackedFilter, dilation: int) -> StackedHeads:
    """y_i = sum_{j < W} taps_j x_{i - j dilation}, with zeros before the first token."""
    y = torch.empty_like(x, dtype=torch.promote_types(x.dtype, taps.dtype))
    for its_x, its_taps, its_y in zip(map(_tokens, x), taps, map(_tokens, y), strict=True):
        first, *others = _rows(its_taps, dilation, its_x)
        for some, start, stop in _parts(its_x, _size(its_x, taps, dilation)):
            own, out = its_x[some], its_y[some]
            torch.mul(own[:, start:stop], first.row, out=out[:, start:stop])
            for shift, row in others:
                begin = max(start, shift)
                out[:, begin:stop].addcmul_(own[:, begin - shift : stop - shift], row)
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
    size, span, length = _size(x, taps, dilation), _span(taps, dilation), x.shape[1]
    sums = x.new_zeros(taps.shape[-1], *size, *x.shape[2:], dtype=torch.promote_types(taps.dtype, torch.float32))
    for some, start, stop in _parts(x, size):
        own, out = x[some], of_x[some]
        # Of these tokens, and of the later ones that read them; no copy of a single stream.
        streams = [gradient[some, :, start : stop + span].transpose(1, 2) for gradient in of_y]
        later = torch.stack(streams, dim=2) if len(streams) > 1 else streams[0][:, :, None]
        products = sums[:, : len(own), : stop - start]
        torch.mul(later[:, : stop - start], first.row, out=out[:, start:stop])
        products[0].addcmul_(later[:, : stop - start], own[:, start:stop])
        for product, (shift, row) in zip(products[1:], others, strict=True):
            begin, end = max(start, shift), min(stop, length - shift)
            out[:, start:end].addcmul_(later[:, shift : end - start + shift], row)
            product[:, begin - start :].addcmul_(later[:, begin - start : stop - start], own[:, begin - shift : stop - shift])
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


def _span(taps: Tensor, dilation: int) -> int:
    """How many tokens back the last tap is."""
    return (taps.shape[-1] - 1) * dilation


def _size(x: Sequences, taps: Tensor, dilation: int) -> tuple[int, int]:
    """Sequences and tokens of a part: all at once where a compiler would unroll them."""
    if torch.compiler.is_compiling():
        return x.shape[0], x.shape[1]
    numbers, row = NUMBERS_AT_ONCE[x.device.type], max(1, x.shape[2:].numel())
    tokens = min(x.shape[1], max(numbers // row, _span(taps, dilation) + 1))
    return min(x.shape[0], max(1, numbers // (tokens * row))), tokens


def _parts(x: Sequences, size: tuple[int, int]) -> list[tuple[slice, int, int]]:
    """Some of the sequences, and of their tokens those from a first one up to before another."""
    (batch, length), (sequences, tokens) = x.shape[:2], size
    return [
        (slice(first, first + sequences), start, min(start + tokens, length))
        for first in range(0, batch, max(1, sequences))
        for start in range(0, length, max(1, tokens))
    ]
