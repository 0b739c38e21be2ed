"""N-gram recall in one layer: the query stands for the last N tokens, the key for the N tokens before its own.

    placement     where the two differ                                                               N
    qk            a convolution of queries, another of keys, one kernel per head                     1 to 4     theorem 1
    k             queries are not convolved, keys are delayed by one                                 1
    kv            KV shifting: k_i = x_{i-1}, v_i = x_i                                              1
    token_shift   k_i = W x_{i-1}, q_i = W x_i, v_i = W x_i                                          1
    input         Canon-A: three copies of a token, with a kernel for q, for k and for v             1 to 3
    qkv           Canon-B: as qk, with kernels per channel and the identity added                    1 to 3
    logits        multi-token attention: a kernel on the diagonal counts equal tokens                1 to 5

N tokens need kernels of N + 1 values: those of Canon layers have 4, those of multi-token attention reach 5 keys back.
"""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from cat.config import ConstructionPlacement, ModelConfig
from cat.mixers.canon import Canon
from cat.mixers.filters import ExplicitFilter
from cat.mixers.multi_token.layer import MultiTokenAttention
from cat.mixers.qkv import DotProductMixer
from cat.mixers.registry import model_config
from cat.mixers.token_shift import TokenShift
from cat.model import Block, SequenceModel
from cat.tasks.recall import CONSTRUCTIONS
from cat.theory.one_layer import one_layer_model, temperature

_SETTINGS: dict[str, dict[str, object]] = {
    "k": {"conv_k": 2},
    "kv": {"conv_k": 2, "conv_v": 2},
    "token_shift": {"token_shift": True},
    "input": {"canon": "A"},
    "qkv": {"canon": "B"},
    "logits": {"mixer": "multi_token", "head_norm": False},
}


@torch.no_grad()
def recall(
    *,
    vocabulary: int,
    ngram: int,
    length: int,
    epsilon: float = 1e-3,
    decay: float = 0.5,
    placement: ConstructionPlacement = "qk",
) -> SequenceModel:
    """Return a model that solves N-gram recall on sequences of up to `length` tokens that begin with BOS (theorem 1).

    A query equals a key if the N-gram that ends at the query equals the one that ends right before the key. Otherwise their
    cosine is at most 1 - `ngram_margin`. Without BOS, the key after a first token u would equal that of (u, .., u).

    Scores reach 6,000 for N = 4. The closest two N-grams are then 15 apart, but neighbouring bfloat16 numbers are 32 apart. With
    `logits`, the score counts equal tokens. It grows only with N: 15 more for each token. `decay` then has no effect.

    Raises ValueError if there is no construction of this placement for N.
    """
    if ngram > CONSTRUCTIONS.get(placement, 0):
        raise ValueError(f"no construction with placement = {placement} solves recall of ngram = {ngram}")
    tokens, kernel = torch.eye(vocabulary), decay ** torch.arange(ngram)
    copies = 3 if placement == "input" else 1
    q, k, v = (F.pad(tokens, (i * vocabulary, (copies - 1 - i) * vocabulary)) for i in (range(3) if copies == 3 else (0, 0, 0)))
    config = _config(placement, width=(copies + 1) * vocabulary, ngram=ngram)
    model, mixer = one_layer_model(config, tokens.repeat(1, copies), q=q, k=k, v=v, decoded=tokens, length=length)
    _set_convolutions(placement, model.layers()[0], mixer, kernel)
    margin = 1.0 if placement == "logits" else ngram_margin(kernel)
    assert mixer.log_temperature is not None
    mixer.log_temperature.fill_(math.log(temperature(margin, length, epsilon)))
    return model


def ngram_margin(kernel: Float[Tensor, " N"]) -> float:
    """Return 1 - the largest cosine between sum_j F_j x_{i-j} of two different N-grams of orthonormal tokens.

    By enumeration of all pairs.
    """
    n = len(kernel)
    letters = 2 * n  # two N-grams have at most 2 N different tokens
    ngrams = torch.cartesian_prod(*[torch.arange(letters)] * n).view(-1, n)
    vectors = F.normalize(kernel.double() @ torch.eye(letters).double()[ngrams], dim=-1)
    # By symmetry, the first N-gram of a pair needs only letters numbered in their order of appearance.
    first = (ngrams <= F.pad(ngrams.cummax(1).values[:, :-1] + 1, (1, 0))).all(1).nonzero()
    cosines = (vectors[first[:, 0]] @ vectors.mT).scatter(1, first, -1.0)
    return 1 - cosines.max().item()


def _config(placement: str, *, width: int, ngram: int) -> ModelConfig:
    settings = _SETTINGS.get(placement) or {"conv_q": ngram, "conv_k": ngram + 1}
    return model_config(**{"mixer": "attention", "width": width, "layers": 1, "heads": 1, "qk_norm": True, **settings})


def _set_convolutions(placement: str, block: Block, mixer: DotProductMixer, kernel: Float[Tensor, " N"]) -> None:
    """Convolve queries with the kernel of the N-gram and keys with the same kernel one token later; leave values as they are."""
    identity = torch.ones(1)
    wanted = {"q": kernel, "k": F.pad(kernel, (1, 0)), "v": identity}
    if placement == "token_shift":
        cast(TokenShift, mixer.token_shift).weight.copy_(torch.tensor([[1.0], [0.0], [1.0]]))
    elif placement == "logits":
        lags, steps = cast(MultiTokenAttention, mixer).kernel, torch.arange(len(kernel))
        lags.zero_()
        lags[0, steps, lags.shape[2] // 2 + 1 + steps] = 1
    elif placement in ("input", "qkv"):
        # Canon-A convolves three copies of the tokens and the channels of the output, Canon-B queries, keys and values.
        canon = cast(Canon, block.canon["A"] if placement == "input" else mixer.canon).kernel
        for channels, response in zip(canon.chunk(4 if placement == "input" else 3), wanted.values(), strict=False):
            channels.copy_(_padded(response, channels) - _padded(identity, channels))
    else:
        for projection, filter_ in mixer.filters.items():
            values = cast(ExplicitFilter, filter_).kernel
            values.copy_(_padded(wanted[projection], values))


def _padded(kernel: Float[Tensor, " N"], like: Float[Tensor, "_ W"]) -> Float[Tensor, " W"]:
    return F.pad(kernel, (0, like.shape[1] - len(kernel)))
