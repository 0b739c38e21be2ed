"""Constructions with hand-set weights that solve the tasks without training (arXiv 2407.05591).

    recall       q_i = sum_{j < N} a^j x_{i-j}    k_i = q_{i-1}              QK normalisation, temperature c         theorem 1
    copying      q_i = sum_j rho^j x_{i-j}        k_i = x_i                  score -c <q, k>, noise keys are 2 x separator
    retrieval    q_i = x_i                        k_i = sum_{j < B} x_{i-j}  at the end of a block: its landmark

All use v_i = x_i. Tokens are one-hot in the first half of the residual stream. Attention writes its output to the second half,
which the head maps to logits.
"""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from cat.config import ModelConfig
from cat.mixers.filters import DecayFilter, ExplicitFilter
from cat.mixers.landmark.config import LandmarkConfig
from cat.mixers.landmark.layer import LandmarkAttention
from cat.mixers.qkv import DotProductMixer
from cat.mixers.registry import model_config
from cat.model import SequenceModel
from cat.tasks.base import Task
from cat.tasks.copying import BOS, SEPARATOR, Copying
from cat.tasks.recall import Recall
from cat.training.fit import build_model
from cat.types import Hidden


def construct(task: Task) -> SequenceModel:
    """Return the construction that solves `task` at all its lengths. Raises ValueError if there is none."""
    task.check_construction()
    max_length = task.lengths[-1]
    if isinstance(task, Recall):
        return recall(vocabulary=task.vocabulary, ngram=task.ngram, length=max_length)
    assert isinstance(task, Copying)
    return copying(alphabet=task.alphabet, noise=task.noise, length=max_length)


@torch.no_grad()
def recall(*, vocabulary: int, ngram: int, length: int, epsilon: float = 1e-3, decay: float = 0.5) -> SequenceModel:
    """Return a model that solves N-gram recall on sequences of up to `length` tokens that begin with BOS (theorem 1).

    A query equals a key if the N-gram that ends at the query equals the one that ends right before the key. Otherwise their
    cosine is at most 1 - `ngram_margin`. Without BOS, the key after a first token u would equal that of (u, .., u).

    Scores reach 6,000 for N = 4. The closest two N-grams are then 15 apart, but neighbouring bfloat16 numbers are 32 apart.
    """
    config = model_config(
        mixer="attention", width=2 * vocabulary, layers=1, heads=1, conv_q=ngram, conv_k=ngram + 1, qk_norm=True
    )
    tokens, kernel = torch.eye(vocabulary), decay ** torch.arange(ngram)
    model, mixer = _one_layer_model(config, tokens, q=tokens, k=tokens, length=length)
    cast(ExplicitFilter, mixer.filters["q"]).kernel.copy_(kernel)
    cast(ExplicitFilter, mixer.filters["k"]).kernel.copy_(F.pad(kernel, (1, 0)))
    assert mixer.log_temperature is not None
    mixer.log_temperature.fill_(math.log(temperature(ngram_margin(kernel), length, epsilon)))
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


def temperature(margin: float, length: int, epsilon: float) -> float:
    """Return the temperature c = log(4 L / epsilon) / m, for which `error_bound` is below `epsilon` / 2."""
    return math.log(4 * length / epsilon) / margin


def error_bound(margin: float, length: int, c: float) -> float:
    """Return the bound 2 (L - 1) exp(-c m) on the L1 distance between the attention output and the correct token.

    It holds if the score of the correct token is at least c times `margin` m above all others.
    """
    return 2 * (length - 1) * math.exp(-c * margin)


@torch.no_grad()
def copying(*, alphabet: int, noise: int, length: int, epsilon: float = 1e-3) -> SequenceModel:
    """Return a model that solves unique selective copying on up to `length` = T tokens, then emits the separator.

    It runs autoregressively. The weight of a token in the query is rho^age with rho = 1 - 1 / T, summed over its occurrences. Its
    score is -c times the weight. The earliest signal not yet copied has the smallest weight. After a copied signals, the weights
    in rising order are:

        the earliest < the next    rho^age, at least rho^T (1 / rho - 1) apart, since ages of two tokens differ and are below T
        the separator              rho^a, as far from the signals before it
        a copied signal            rho^age + rho^b with b < a, at least (1 / rho - 1) rho^a above the separator
        noise, BOS                 2 rho^a, at least rho^a above the token that must win

    Nothing here depends on where a sequence ends, so one rho and one c suffice for every length up to T.

    c is about e T log(4 T / epsilon), 42,000 for T = 1,024, and scores are 15 apart. float32 resolves them up to T of about
    100,000. Neighbouring bfloat16 numbers are 256 apart at this size, neighbouring TF32 numbers 32.
    """
    signals, separator = 2 + torch.arange(alphabet), alphabet
    tokens = torch.zeros(2 + alphabet + noise, alphabet + 2)
    tokens[signals] = torch.eye(alphabet, alphabet + 2)
    tokens[SEPARATOR, separator] = 1
    tokens[[BOS, *range(2 + alphabet, len(tokens))], separator + 1] = 1
    key = torch.eye(alphabet + 2)
    key[:, -1] = 2 * key[:, separator]

    config = model_config(mixer="attention", width=2 * tokens.shape[1], layers=1, heads=1, conv_q="state", filter_size=1)
    c = temperature(copying_margin(length), length, epsilon)
    scale = math.sqrt(config.width)  # cancels the 1 / sqrt(width) of attention
    model, mixer = _one_layer_model(config, tokens, q=-c * scale * torch.eye(alphabet + 2), k=key, length=length)
    query_filter = cast(DecayFilter, mixer.filters["q"])
    query_filter.log_rate.fill_(math.log(-math.log(1 - 1 / length)))
    query_filter.coefficients.fill_(1)
    query_filter.direct.fill_(0)
    return model


def copying_margin(length: int) -> float:
    """Return rho^T (1 / rho - 1), the smallest difference between the weights of two tokens in the query."""
    rho = 1 - 1 / length
    return rho**length * (1 / rho - 1)


def _one_layer_model(
    config: ModelConfig, tokens: Float[Tensor, "V A"], *, q: Float[Tensor, "A A"], k: Float[Tensor, "A A"], length: int
) -> tuple[SequenceModel, DotProductMixer]:
    """Build a one-layer model with one-hot embeddings `tokens`, and return it with its mixer.

    The caller sets the filters and the temperature.
    """
    model = build_model(config, vocabulary=len(tokens), length=length, seed=0)
    (block,) = model.layers()
    mixer, half, width = cast(DotProductMixer, block.mixer), tokens.shape[1], config.width
    model.embedding.token.weight.copy_(F.pad(tokens, (0, half)))
    # Make the norm the identity on one-hot vectors, whose mean is 1 / d and whose variance is 1 / d - 1 / d^2.
    norm = cast(nn.LayerNorm, block.mixer_norm)
    norm.weight.fill_(math.sqrt(1 / width - 1 / width**2 + norm.eps))
    norm.bias.fill_(1 / width)
    for linear, weight in ((mixer.q_proj, q), (mixer.k_proj, k), (mixer.v_proj, torch.eye(half))):
        linear.weight.copy_(F.pad(weight, (0, half, 0, half)))
    mixer.o_proj.weight.copy_(F.pad(torch.eye(half), (0, half, half, 0)))
    model.head.weight.copy_(F.pad(tokens, (half, 0)))
    return model, mixer


@torch.no_grad()
def block_retrieval(*, width: int, length: int, block: int, kernel: Float[Tensor, " W"] | None = None) -> LandmarkAttention:
    """Return landmark attention whose landmarks are the sums of their blocks.

    With `kernel`, a landmark is the convolution of the tokens with it, at the end of the block.
    """
    kernel = torch.ones(block) if kernel is None else kernel
    config = LandmarkConfig(heads=1, conv_k=len(kernel), block=block, top=1)
    with torch.random.fork_rng(devices=[]):
        mixer = LandmarkAttention(config, width=width, length=length)
    for linear in (mixer.q_proj, mixer.k_proj, mixer.v_proj, mixer.o_proj):
        linear.weight.copy_(torch.eye(width))
    cast(ExplicitFilter, mixer.filters["k"]).kernel.copy_(kernel)
    return mixer


def random_context(
    *, width: int, length: int, block: int, count: int, generator: torch.Generator
) -> tuple[Hidden, Int[Tensor, " B"]]:
    """Draw from the random context model: return `count` sequences, and the position of a copy of the last token in each.

    Tokens are N(0, I / d); the last token has norm 1. Its copy is at a random position in the blocks before its own.
    """
    x = torch.randn(count, length, width, generator=generator) / math.sqrt(width)
    x[:, -1] = F.normalize(x[:, -1], dim=-1)
    earlier = (length - 1) // block * block
    position = torch.randint(earlier, (count,), generator=generator)
    x[torch.arange(count), position] = x[:, -1]
    return x, position


def wrong_block_bound(width: int, length: int, block: int) -> float:
    """Return the bound (L / B) exp(-d / (2 (2 B - 1))) / 2 on the probability that landmarks choose a wrong block.

    For a box filter in the random context model.
    """
    return length / block / 2 * math.exp(-width / (2 * (2 * block - 1)))


def sufficient_width(length: int, block: int, epsilon: float) -> int:
    """Return the width d = 4 B log(L / (B epsilon)), rounded up, for which `wrong_block_bound` is at most `epsilon` / 2."""
    return math.ceil(4 * block * math.log(length / (block * epsilon)))
