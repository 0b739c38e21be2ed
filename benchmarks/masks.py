"""Benchmark the layer with padding and with packed documents, against the layer without masks on the same batch."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from benchmarks.measure import COST, Benchmark, Case, Work, compared, normal, same_shapes
from cat.layer import ConvolutionAugmentedAttention

TARGET = 1.1
KINDS = ("padding on the right", "padding on the left", "packed documents")


def masks(*, batch: int = 8, length: int = 1024, width: int = 256) -> Benchmark:
    """Measure a forward and backward pass of CAT attention, kernel size 4 on q, k and v.

    Sequences have half to all of the tokens of a row. Packed documents have between 1 and half as many.
    """
    cases = [
        Case(
            name=f"{batch} x {length:,} tokens, {kind}",
            ours=partial(layer_passes, kind, batch, length, width),
            other=partial(layer_passes, None, batch, length, width),
            sides=("with the mask", "without"),
            unit=COST,
            target=TARGET,
            agree=same_shapes,  # padding and other documents are no longer seen
            count=(batch * length, "tokens"),
        )
        for kind in KINDS
    ]
    return Benchmark(
        what="CAT attention with padding and with packed documents, against no mask on the same batch",
        target=f"{TARGET} times the time",
        figures=compared(lambda device: cases),
    )


def layer_passes(kind: str | None, batch: int, length: int, width: int, device: str) -> Work:
    """Prepare a forward and backward pass, with the gradients of all weights."""
    torch.manual_seed(0)
    layer = ConvolutionAugmentedAttention(width, 4, conv_q=4, conv_k=4, conv_v=4).to(device)
    x, gradient = (t.to(device) for t in normal(*[(batch, length, width)] * 2))
    leaves = [x.requires_grad_(), *layer.parameters()]
    given = {} if kind is None else mask(kind, batch, length)
    options = {name: value.to(device) for name, value in given.items()}

    def work() -> list[Tensor]:
        y = layer(x, **options)
        return [y.detach(), *torch.autograd.grad(y, leaves, gradient)]

    return work


def mask(kind: str, batch: int, length: int) -> dict[str, Tensor]:
    """Return the mask of a batch as an argument of the layer."""
    generator = torch.Generator().manual_seed(0)
    column = torch.arange(length)
    if kind == "packed documents":
        ends = torch.randint(1, length // 2 + 1, (batch, length), generator=generator).cumsum(1)
        return {"segment_ids": torch.searchsorted(ends, column.expand(batch, -1).contiguous(), right=True)}
    tokens = torch.randint(length // 2, length + 1, (batch, 1), generator=generator)
    return {"attention_mask": column < tokens if kind.endswith("right") else column >= length - tokens}
