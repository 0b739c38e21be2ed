"""Diagnostics of a trained model: attention statistics, filter kernels, and the length condition on key filters."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Integer
from torch import Tensor

from cat.evaluation.scores import evaluation_mode
from cat.mixers.attention.config import only_keys_convolved
from cat.mixers.base import Mixer
from cat.mixers.filters import Filter
from cat.mixers.qkv import Projection, QKVMixer
from cat.model import SequenceModel
from cat.ops.attention import repeat_heads
from cat.ops.conv.causal import dilate
from cat.types import Hidden, Tokens

MAX_TOKENS = 4096
"""Tokens per diagnostic during training: as many whole sequences as fit, at least one."""


class AttentionStatistics(NamedTuple):
    """Statistics of one layer over the target positions."""

    entropy: float
    """Nats, the mean over heads. Uniform attention over n tokens has entropy log n."""
    on_answer: float | None
    """Attention weight on the token that holds the answer, in the head where it is largest."""


@torch.no_grad()
def attention_statistics(
    model: SequenceModel, inputs: Tokens, is_target: Bool[Tensor, "B L"], answer_positions: Int[Tensor, "B L"] | None = None
) -> list[AttentionStatistics | None]:
    """Return the statistics of each layer at the target positions; None for layers without attention.

    `answer_positions` is where the context holds the answer of each target position. A value filter is ignored: it does not
    change the attention weights.
    """
    statistics: list[AttentionStatistics | None] = []
    for weights in attention_maps(model, inputs):
        if weights is None:
            statistics.append(None)
            continue
        target_weights = weights.transpose(1, 2)[is_target]
        entropy = torch.special.entr(target_weights).sum(-1).mean().item()
        on_answer = None
        if answer_positions is not None:
            positions = answer_positions[is_target][:, None, None].expand(-1, target_weights.shape[1], 1)
            on_answer = target_weights.gather(2, positions)[..., 0].mean(0).max().item()
        statistics.append(AttentionStatistics(entropy, on_answer))
    return statistics


def attention_maps(model: SequenceModel, inputs: Tokens) -> Iterator[Float[Tensor, "B H L L"] | None]:
    """Yield the attention weights of each layer; None for layers without attention."""
    for mixer, projected in _projections(model, inputs):
        yield _weights(mixer, projected)


def attention_weights(mixer: Mixer, x: Hidden) -> Float[Tensor, "B H L L"] | None:
    """Return the attention weights: the output of the mixer for one-hot values.

    None if the mixer has no non-negative weights that sum to one.
    """
    return _weights(mixer, mixer.project(x))


def _weights(mixer: Mixer, projected: Projection) -> Float[Tensor, "B H L L"] | None:
    if not isinstance(mixer, QKVMixer) or not mixer.config.has_attention:
        return None
    q, k, v, *others = mixer.prepare(projected)
    one_hot = torch.eye(v.shape[2], dtype=v.dtype, device=v.device).expand(*v.shape[:2], -1, -1)
    with evaluation_mode(mixer):
        return mixer.attend(q, k, one_hot, *others)


def _projections(model: SequenceModel, inputs: Tokens) -> Iterator[tuple[Mixer, Projection]]:
    """Yield the mixer and its projection for each layer. The rest of the last layer is not computed."""
    x = model.embedding(inputs)
    *others, last = model.layers()
    for block in others:
        projected = block.project(x)
        yield block.mixer, projected
        x = block(x, projected=projected)
    yield last.mixer, last.project(x)


@torch.no_grad()
def max_logit(model: SequenceModel, inputs: Integer[Tensor, "N L"]) -> float | None:
    """Return the largest attention logit over all layers and heads, on the first sequences.

    None if no layer has a softmax. Attention logits that grow without bound precede divergence (arXiv 2302.05442, 2309.14322).
    """
    largest = -math.inf
    for mixer, projected in _projections(model, _first_sequences(inputs)):
        if isinstance(mixer, QKVMixer):
            q, k, *_ = mixer.prepare(projected)
            if (logits := mixer.logits(q, k)) is not None:
                largest = max(largest, logits.max().item())
    return None if largest == -math.inf else largest


@torch.no_grad()
def head_entropies(model: SequenceModel, inputs: Integer[Tensor, "N L"]) -> list[list[float] | None]:
    """Return the attention entropy in nats per layer and head, the mean over all tokens of the first sequences.

    None for a layer without attention.
    """
    return [
        None if weights is None else torch.special.entr(weights).sum(-1).mean((0, 2)).tolist()
        for weights in attention_maps(model, _first_sequences(inputs))
    ]


def _first_sequences(inputs: Integer[Tensor, "N L"]) -> Int[Tensor, "n L"]:
    return inputs[: max(1, MAX_TOKENS // inputs.shape[1])].long()


class FilterKernel(NamedTuple):
    """The kernel of a trained filter at the training length."""

    layer: int
    projection: str
    head: str
    """The head, or `g>h` for a filter from head g to head h. A filter per channel is averaged over the channels of its head."""
    kernel: list[float]
    dilation: int
    """Tokens between neighbouring kernel values."""


@torch.no_grad()
def filter_kernels(model: SequenceModel) -> list[FilterKernel]:
    """Return the kernel of every filter on a projection, in every layer."""
    kernels: list[FilterKernel] = []
    for layer, block in enumerate(model.layers(), 1):
        if not isinstance(block.mixer, QKVMixer):
            continue
        for projection, module in block.mixer.filters.items():
            causal_filter = cast(Filter, module)
            kernel = causal_filter.response(model.length)
            match causal_filter.layout.sharing:
                case "mixing":
                    by_head = {f"{g}>{h}": kernel[h, g] for h in range(len(kernel)) for g in range(len(kernel))}
                case "channel":
                    by_head = {str(h): kernel[h].mean(0) for h in range(len(kernel))}
                case _:
                    by_head = {str(h): kernel[h] for h in range(len(kernel))}
            kernels += [
                FilterKernel(layer, projection, head, values.tolist(), causal_filter.dilation) for head, values in by_head.items()
            ]
    return kernels


@torch.no_grad()
def key_filter_solves_every_length(model: SequenceModel) -> bool | None:
    """Return whether a trained key filter meets the condition of `solves_every_length` in any head.

    The kernel is multiplied by the sign of the head's scores: the mean score of a token with itself minus that of any two tokens.

    None unless the condition applies: one layer of attention to all tokens, without positions, QK normalisation and biases, whose
    only filters are on the keys, one per head. The condition assumes orthonormal tokens; trained tokens are orthonormal only
    approximately.
    """
    if not only_keys_convolved(model.config):
        return None
    (block,) = model.layers()
    mixer = cast(QKVMixer, block.mixer)
    tokens = block.mixer_norm(model.embedding.token.weight)
    q, k, _ = (heads[0] for heads in mixer.split_heads(mixer.project(tokens[None])))
    key_filter = cast(Filter, mixer.filters["k"])
    kernel = F.pad(dilate(key_filter.response(model.length), key_filter.dilation), (0, 1))
    k, kernel = (repeat_heads(x[None], len(q))[0] for x in (k, kernel))
    same = (q * k).sum(-1).mean(-1)
    any_pair = (q.mean(-2) * k.mean(-2)).sum(-1)
    return bool(solves_every_length(kernel * (same - any_pair).sign()[:, None]).any())


def solves_every_length(kernel: Float[Tensor, "*filters W"]) -> Bool[Tensor, "*filters"]:
    """Return whether a causal key filter of kernel size 2 or more solves associative recall (N = 1) at every length.

    Exact at zero temperature for orthonormal tokens, keys that are no values, unfiltered queries and no QK normalisation:

        F_1 > max(0, F_0, F_j, F_0 + F_j for every j >= 2)

    The token after the first occurrence must score higher than the query's own position, than every later position that the
    filter spreads the key to, and than positions where two such contributions add up.
    """
    first, second, rest = kernel[..., 0], kernel[..., 1], F.pad(kernel[..., 2:], (0, 1))
    return second > torch.maximum(rest, first[..., None] + rest).amax(-1).clamp(min=0)
