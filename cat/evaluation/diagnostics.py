"""What a trained model does: where its attention is, and whether its key filter solves associative recall at every length."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Integer
from torch import Tensor

from cat.mixers.attention.config import AttentionConfig
from cat.mixers.base import Mixer
from cat.mixers.filters import Filter
from cat.mixers.qkv import Projection, QKVMixer
from cat.model import SequenceModel
from cat.ops.conv.causal import dilate
from cat.types import Hidden, Tokens

MAX_TOKENS = 4096
"""Tokens, whole sequences of them and one at least, in which attention is looked at while a model is trained."""


class AttentionStatistics(NamedTuple):
    """Of one layer, over the positions that ask for an answer."""

    entropy: float
    """Nats, the mean over heads: the logarithm of how many tokens share a query's attention."""
    on_answer: float | None
    """Share of the attention that is on the token that holds the answer, in the head where that is largest."""


@torch.no_grad()
def attention_statistics(
    model: SequenceModel, inputs: Tokens, is_target: Bool[Tensor, "B L"], answer_positions: Int[Tensor, "B L"] | None = None
) -> list[AttentionStatistics | None]:
    """What each layer attends to at the `asked` positions, whose answers stand at `sources`; None for layers without attention.

    A filter on the values is left out of account: it changes what is read off, not where.
    """
    statistics: list[AttentionStatistics | None] = []
    for weights in attention_maps(model, inputs):
        if weights is None:
            statistics.append(None)
            continue
        rows = weights.transpose(1, 2)[is_target]
        entropy = torch.special.entr(rows).sum(-1).mean().item()
        on_answer = None
        if answer_positions is not None:
            at = answer_positions[is_target][:, None, None].expand(-1, rows.shape[1], 1)
            on_answer = rows.gather(2, at)[..., 0].mean(0).max().item()
        statistics.append(AttentionStatistics(entropy, on_answer))
    return statistics


def attention_maps(model: SequenceModel, inputs: Tokens) -> Iterator[Float[Tensor, "B H L L"] | None]:
    """The attention weights of one layer after the other; None for layers without attention."""
    for mixer, projected in _projections(model, inputs):
        yield _weights(mixer, projected)


def attention_weights(mixer: Mixer, x: Hidden) -> Float[Tensor, "B H L L"] | None:
    """How much each token reads of each: what the mixer makes of values that are axes. None where these are no shares."""
    return _weights(mixer, mixer.project(x))


def _weights(mixer: Mixer, projected: Projection) -> Float[Tensor, "B H L L"] | None:
    if not isinstance(mixer, QKVMixer) or not mixer.config.has_attention:
        return None
    q, k, v, *others = mixer.prepare(projected)
    axes = torch.eye(v.shape[2], dtype=v.dtype, device=v.device).expand(*v.shape[:2], -1, -1)
    return mixer.attend(q, k, axes, *others)


def _projections(model: SequenceModel, inputs: Tokens) -> Iterator[tuple[Mixer, Projection]]:
    """The mixer of one layer after the other, and what it has made of each token; the last layer is not computed further."""
    x = model.embedding(inputs)
    *others, last = model.layers()
    for block in others:
        projected = block.project(x)
        yield block.mixer, projected
        x = block(x, projected=projected)
    yield last.mixer, last.project(x)


@torch.no_grad()
def max_logit(model: SequenceModel, inputs: Integer[Tensor, "N L"]) -> float | None:
    """Before the softmax, of all layers that have one and their heads, on the first sequences; None where no layer has.

    Attention that grows without a limit is what precedes divergence (arXiv 2302.05442, 2309.14322).
    """
    largest = -math.inf
    for mixer, projected in _projections(model, _first(inputs)):
        if isinstance(mixer, QKVMixer):
            q, k, *_ = mixer.prepare(projected)
            if (logits := mixer.logits(q, k)) is not None:
                largest = max(largest, logits.max().item())
    return None if largest == -math.inf else largest


@torch.no_grad()
def head_entropies(model: SequenceModel, inputs: Integer[Tensor, "N L"]) -> list[list[float] | None]:
    """Of attention in nats, a list a layer with the mean of each head over all tokens of the first sequences.

    None for a layer without attention.
    """
    return [
        None if weights is None else torch.special.entr(weights).sum(-1).mean((0, 2)).tolist()
        for weights in attention_maps(model, _first(inputs))
    ]


def _first(inputs: Integer[Tensor, "N L"]) -> Int[Tensor, "n L"]:
    return inputs[: max(1, MAX_TOKENS // inputs.shape[1])].long()


class FilterKernel(NamedTuple):
    """A trained filter as it is applied at the training length."""

    layer: int
    projection: str
    head: str
    """The head; `g>h` from head g to head h where heads are mixed. Where each channel has a filter, the head's mean."""
    kernel: list[float]
    dilation: int
    """Tokens from one tap to the next."""


@torch.no_grad()
def filter_kernels(model: SequenceModel) -> list[FilterKernel]:
    """Every filter on a stream of every layer."""
    found: list[FilterKernel] = []
    for layer, block in enumerate(model.layers(), 1):
        if not isinstance(block.mixer, QKVMixer):
            continue
        for projection, module in block.mixer.filters.items():
            causal_filter = cast(Filter, module)
            kernel = causal_filter.response(model.length)
            match causal_filter.layout.sharing:
                case "mixing":
                    rows = {f"{g}>{h}": kernel[h, g] for h in range(len(kernel)) for g in range(len(kernel))}
                case "channel":
                    rows = {str(h): kernel[h].mean(0) for h in range(len(kernel))}
                case _:
                    rows = {str(h): kernel[h] for h in range(len(kernel))}
            found += [
                FilterKernel(layer, projection, row, numbers.tolist(), causal_filter.dilation) for row, numbers in rows.items()
            ]
    return found


@torch.no_grad()
def key_filter_solves_every_length(model: SequenceModel) -> bool | None:
    """Whether a trained key filter meets the condition of `solves_every_length` in any head, with the sign of its scores.

    None unless the model is what the condition is about: one layer of attention without positions, its rows not normalised, whose
    only filters are on the keys, one a head. The condition takes tokens for orthonormal, which trained ones are in part.
    """
    config = model.config
    if not isinstance(config, AttentionConfig) or not config.only_keys_convolved:
        return None
    (block,) = model.layers()
    mixer = cast(QKVMixer, block.mixer)
    tokens = block.mixer_norm(model.embedding.token.weight)
    q, k = mixer.project(tokens).unflatten(-1, (3, config.heads, -1)).permute(1, 2, 0, 3)[:2]
    same = (q * k).sum(-1).mean(-1)
    any_two = (q.mean(-2) * k.mean(-2)).sum(-1)
    on_keys = cast(Filter, mixer.filters["k"])
    kernel = F.pad(dilate(on_keys.response(model.length), on_keys.dilation), (0, 1))
    return bool(solves_every_length(kernel * (same - any_two).sign()[:, None]).any())


def solves_every_length(kernel: Float[Tensor, "*filters W"]) -> Bool[Tensor, "*filters"]:
    """Whether a causal filter of two taps or more on the keys solves associative recall (N = 1) at every length.

    Exact at zero temperature for orthonormal tokens, queries without a filter and rows that are not normalised: the token after
    the first occurrence must win over the question's own place, over every later trace of the token, and over places where two
    traces add up:   F_1 > max(0, F_0, F_j, F_0 + F_j for every j >= 2)   and   F_0 + F_1 > 0.
    """
    first, second, rest = kernel[..., 0], kernel[..., 1], F.pad(kernel[..., 2:], (0, 1))
    rival = torch.maximum(rest, first[..., None] + rest).amax(-1)
    return (second > rival.clamp(min=0)) & (first + second > 0)
