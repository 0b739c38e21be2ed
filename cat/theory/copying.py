"""Unique selective copying in one layer, with kernels as long as the sequence.

    placement   score of token i for the last token x_L                           convolution
    q           -c times the weight of x_i in the query, sum_j rho^j x_{L-j}      of queries, one kernel      the paper's
    k           c times the weight of x_L in the key, sum_{j > 0} rho^j x_{i-j}   of keys, a kernel per channel

With `q`, the earliest signal not yet copied has the smallest weight. With `k`, the signal after the last copy has the largest:
its key is the first after x_L.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from cat.config import ConstructionPlacement
from cat.mixers.filters import DecayFilter
from cat.mixers.registry import model_config
from cat.model import SequenceModel
from cat.tasks.copying import BOS, CONSTRUCTIONS, SEPARATOR
from cat.theory.one_layer import one_layer_model, temperature


@torch.no_grad()
def copying(
    *, alphabet: int, noise: int, length: int, epsilon: float = 1e-3, placement: ConstructionPlacement = "q"
) -> SequenceModel:
    """Return a model that solves unique selective copying on up to `length` = T tokens, then emits the separator.

    It runs autoregressively. rho is 1 - 1 / T. Scores of two tokens that compete differ by at least c `copying_margin`. Nothing
    here depends on where a sequence ends, so one rho and one c suffice for every length up to T.

    c is about e T log(4 T / epsilon), 42,000 for T = 1,024, and scores are 15 apart. float32 resolves them up to T of about
    100,000. Neighbouring bfloat16 numbers are 256 apart at this size, neighbouring TF32 numbers 32.

    Raises ValueError if there is no construction of this placement.
    """
    if placement not in CONSTRUCTIONS:
        raise ValueError(f"no construction with placement = {placement} solves copying")
    c = temperature(copying_margin(length), length, epsilon)
    build = _by_queries if placement == "q" else _by_keys
    return build(alphabet, noise, length, c)


def copying_margin(length: int) -> float:
    """Return rho^T (1 / rho - 1), the smallest difference between the weights of two tokens in the query."""
    rho = 1 - 1 / length
    return rho**length * (1 / rho - 1)


def _by_queries(alphabet: int, noise: int, length: int, c: float) -> SequenceModel:
    """The weight of a token in the query is rho^age, summed over its occurrences. Its score is -c times the weight.

    After a copied signals, the weights in rising order are:

        the earliest < the next    rho^age, at least rho^T (1 / rho - 1) apart, since ages of two tokens differ and are below T
        the separator              rho^a, as far from the signals before it
        a copied signal            rho^age + rho^b with b < a, at least (1 / rho - 1) rho^a above the separator
        noise, BOS                 2 rho^a, at least rho^a above the token that must win
    """
    tokens = _one_hot(alphabet, noise, axes=alphabet + 2)
    separator = alphabet
    key = torch.eye(alphabet + 2)
    key[:, -1] = 2 * key[:, separator]
    config = model_config(mixer="attention", width=2 * tokens.shape[1], layers=1, heads=1, conv_q="state", filter_size=1)
    q = -c * math.sqrt(config.width) * torch.eye(alphabet + 2)  # the root cancels the 1 / sqrt(width) of attention
    model, mixer = one_layer_model(config, tokens, q=q, k=key, v=torch.eye(len(key)), decoded=tokens, length=length)
    _set_decay(cast(DecayFilter, mixer.filters["q"]), length, summed=torch.ones(1), direct=torch.zeros(1))
    return model


def _by_keys(alphabet: int, noise: int, length: int, c: float) -> SequenceModel:
    """Channels of signals and BOS sum rho^j x_{i-j} over j > 0, those of noise and separator hold the token itself.

    The query is the last token, or BOS if that is the separator. Scores, divided by c and in falling order:

        the next signal       rho^age of x_L, the smallest age; others, the separator and copied signals have larger ages
        a token before x_L    0: the key has no x_L; also x_L itself, because j > 0
        noise                 at most rho - 1, since 1 is subtracted
    """
    tokens = _one_hot(alphabet, noise, axes=alphabet + 3)
    separator, bos, other = alphabet, alphabet + 1, alphabet + 2
    tokens[BOS] = torch.eye(alphabet + 3)[bos]
    query = torch.eye(alphabet + 3)
    query[:, [separator, bos, other]] = 0
    query[bos, separator] = 1
    query[other, [*range(alphabet), separator]] = -1
    settings = {"conv_k": "state", "filter_size": 1, "sharing": "channel"}
    config = model_config(mixer="attention", width=2 * tokens.shape[1], layers=1, heads=1, **settings)
    q, same = c * math.sqrt(config.width) * query, torch.eye(alphabet + 3)
    model, mixer = one_layer_model(config, tokens, q=q, k=same, v=same, decoded=tokens, length=length)
    is_summed = torch.ones(config.width)
    is_summed[[separator, other]] = 0
    _set_decay(cast(DecayFilter, mixer.filters["k"]), length, summed=is_summed, direct=1 - 2 * is_summed)
    return model


def _one_hot(alphabet: int, noise: int, *, axes: int) -> Float[Tensor, "V {axes}"]:
    """One axis per signal, then one of the separator; the last one is of all other tokens."""
    tokens = torch.zeros(2 + alphabet + noise, axes)
    tokens[2 + torch.arange(alphabet)] = torch.eye(alphabet, axes)
    tokens[SEPARATOR, alphabet] = 1
    tokens[[BOS, *range(2 + alphabet, len(tokens))], axes - 1] = 1
    return tokens


def _set_decay(filter_: DecayFilter, length: int, *, summed: Float[Tensor, "#C"], direct: Float[Tensor, "#C"]) -> None:
    """Set the kernel `summed` rho^j, plus `direct` at j = 0, with rho = 1 - 1 / `length`."""
    filter_.log_rate.fill_(math.log(-math.log(1 - 1 / length)))
    filter_.coefficients.copy_(summed[..., None])
    filter_.direct.copy_(direct)
