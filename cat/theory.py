"""The theorems' models: nothing trained, every weight prescribed (arXiv 2407.05591).

    recall       q_i = sum_{j < N} a^j x_{i-j}    k_i = q_{i-1}              rows of unit length, temperature c      theorem 1
    copying      q_i = sum_j rho^j x_{i-j}        k_i = x_i                  score -c <q, k>, noise read as 2 x separator
    retrieval    q_i = x_i                        k_i = sum_{j < B} x_{i-j}  at the end of a block: its landmark

All have v_i = x_i. Tokens are axes in the first half of the residual stream; what attention reads of them goes to the second
half, and the head finds it there.
"""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from cat.mixers.attention.config import AttentionConfig
from cat.mixers.filters import DecayFilter, ExplicitFilter
from cat.mixers.landmark.config import LandmarkConfig
from cat.mixers.landmark.layer import LandmarkAttention
from cat.mixers.qkv import QKVMixer
from cat.model import SequenceModel
from cat.tasks.base import Task
from cat.tasks.copying import BOS, SEPARATOR, Copying
from cat.tasks.recall import Recall
from cat.training.fit import build_model
from cat.types import Hidden


def construct(task: Task) -> SequenceModel:
    """The model that solves `task` at all its lengths. Raises ValueError, in words, where there is no such theorem."""
    task.check_theorem()
    longest = task.lengths[-1]
    if isinstance(task, Recall):
        return recall(vocabulary=task.vocabulary, ngram=task.ngram, length=longest)
    assert isinstance(task, Copying)
    return copying(alphabet=task.alphabet, noise=task.noise, length=longest)


@torch.no_grad()
def recall(*, vocabulary: int, ngram: int, length: int, epsilon: float = 1e-3, decay: float = 0.5) -> SequenceModel:
    """Solves N-gram recall on sequences of up to `length` tokens that begin with BOS (theorem 1).

    A query and a key are the same where the N-grams that end at the query and right before the key are, and have a cosine of at
    most 1 - `ngram_margin` elsewhere. Without BOS, the key behind a first token u is that of (u, .., u) too.

    Scores reach 6,000 for N = 4, where the closest two N-grams are 15 apart and neighbouring numbers of bfloat16 32.
    """
    config = AttentionConfig(
        mixer="attention", width=2 * vocabulary, layers=1, heads=1, position="none", conv_q=ngram, conv_k=ngram + 1, qk_norm=True
    )
    axes, taps = torch.eye(vocabulary), decay ** torch.arange(ngram)
    model, mixer = _reader(config, axes, q=axes, k=axes, length=length)
    cast(ExplicitFilter, mixer.filters["q"]).kernel.copy_(taps)
    cast(ExplicitFilter, mixer.filters["k"]).kernel.copy_(F.pad(taps, (1, 0)))
    assert mixer.log_temperature is not None
    mixer.log_temperature.fill_(math.log(temperature(ngram_margin(taps), length, epsilon)))
    return model


def ngram_margin(kernel: Float[Tensor, " N"]) -> float:
    """1 - the largest cosine between sum_j F_j x_{i-j} of two different N-grams of orthonormal tokens: by looking at them all."""
    n = len(kernel)
    letters = 2 * n  # of two N-grams
    ngrams = torch.cartesian_prod(*[torch.arange(letters)] * n).view(-1, n)
    rows = F.normalize(kernel.double() @ torch.eye(letters).double()[ngrams], dim=-1)
    # One of the two may as well be written in letters that are numbered as they appear.
    first = (ngrams <= F.pad(ngrams.cummax(1).values[:, :-1] + 1, (1, 0))).all(1).nonzero()
    cosines = (rows[first[:, 0]] @ rows.mT).scatter(1, first, -1.0)
    return 1 - cosines.max().item()


def temperature(margin: float, length: int, epsilon: float) -> float:
    """The c with which `error_bound` is below `epsilon` / 2: log(4 L / epsilon) / m."""
    return math.log(4 * length / epsilon) / margin


def error_bound(margin: float, length: int, c: float) -> float:
    """Bounds how far what is read is from the right token, in sum of absolute values: 2 (L - 1) exp(-c m).

    The right token's score is then at least c times `margin` m above the others.
    """
    return 2 * (length - 1) * math.exp(-c * margin)


@torch.no_grad()
def copying(*, alphabet: int, noise: int, length: int, epsilon: float = 1e-3) -> SequenceModel:
    """Solves unique selective copying, autoregressively, on sequences of up to `length` = T tokens, then emits the separator.

    A token's weight in the query is rho^age, rho = 1 - 1 / T, summed over its places; its score is -c times that. The least
    weight is that of the earliest signal not yet copied. With a signals copied, in rising order:

        the earliest < the next    rho^age, at least rho^T (1 / rho - 1) apart, since ages of two tokens differ and are below T
        the separator              rho^a, as far from the signals before it
        a copied signal            rho^age + rho^b with b < a, at least (1 / rho - 1) rho^a above the separator
        noise, BOS                 2 rho^a, at least rho^a above whatever ought to win

    Nothing here depends on where a sequence ends, so the same rho and c do for every length up to T. c is about
    e T log(4 T / epsilon), 42,000 for T = 1,024, and scores that are 15 apart: float32 tells them apart up to T of about
    100,000; neighbouring numbers of bfloat16 are 256 apart there, those of TF32 32.
    """
    signals, separator = 2 + torch.arange(alphabet), alphabet
    axes = torch.zeros(2 + alphabet + noise, alphabet + 2)
    axes[signals] = torch.eye(alphabet, alphabet + 2)
    axes[SEPARATOR, separator] = 1
    axes[[BOS, *range(2 + alphabet, len(axes))], separator + 1] = 1
    key = torch.eye(alphabet + 2)
    key[:, -1] = 2 * key[:, separator]

    config = AttentionConfig(
        mixer="attention", width=2 * axes.shape[1], layers=1, heads=1, position="none", conv_q="state", filter_size=1
    )
    c = temperature(copying_margin(length), length, epsilon)
    scale = math.sqrt(config.width)  # by which attention divides
    model, mixer = _reader(config, axes, q=-c * scale * torch.eye(alphabet + 2), k=key, length=length)
    memory = cast(DecayFilter, mixer.filters["q"])
    memory.log_rate.fill_(math.log(-math.log(1 - 1 / length)))
    memory.coefficients.fill_(1)
    memory.direct.fill_(0)
    return model


def copying_margin(length: int) -> float:
    """rho^T (1 / rho - 1), how far apart two tokens' weights in the query are at least."""
    rho = 1 - 1 / length
    return rho**length * (1 / rho - 1)


def _reader(
    config: AttentionConfig, axes: Float[Tensor, "V A"], *, q: Float[Tensor, "A A"], k: Float[Tensor, "A A"], length: int
) -> tuple[SequenceModel, QKVMixer]:
    """A model of one layer whose tokens have one-hot vectors `axes`, and its mixer; filters and temperature are left to set."""
    model = build_model(config, vocabulary=len(axes), length=length, seed=0)
    (block,) = model.layers()
    mixer, half, width = cast(QKVMixer, block.mixer), axes.shape[1], config.width
    model.embedding.token.weight.copy_(F.pad(axes, (0, half)))
    # The identity on one-hot vectors, whose mean is 1 / d and whose variance is 1 / d - 1 / d^2.
    norm = cast(nn.LayerNorm, block.mixer_norm)
    norm.weight.fill_(math.sqrt(1 / width - 1 / width**2 + norm.eps))
    norm.bias.fill_(1 / width)
    mixer.projection.weight.copy_(torch.cat([F.pad(w, (0, half, 0, half)) for w in (q, k, torch.eye(half))]))
    mixer.output.weight.copy_(F.pad(torch.eye(half), (0, half, half, 0)))
    model.head.weight.copy_(F.pad(axes, (half, 0)))
    return model, mixer


@torch.no_grad()
def block_retrieval(*, width: int, length: int, block: int, kernel: Float[Tensor, " W"] | None = None) -> LandmarkAttention:
    """Landmarks that are the sums of their blocks, or what other `taps` make of the tokens up to the end of a block."""
    kernel = torch.ones(block) if kernel is None else kernel
    config = LandmarkConfig(
        mixer="landmark", width=width, layers=1, heads=1, position="none", conv_k=len(kernel), block=block, top=1
    )
    with torch.random.fork_rng(devices=[]):
        mixer = LandmarkAttention(config, length)
    mixer.projection.weight.copy_(torch.eye(width).repeat(3, 1))
    mixer.output.weight.copy_(torch.eye(width))
    cast(ExplicitFilter, mixer.filters["k"]).kernel.copy_(kernel)
    return mixer


def random_context(
    *, width: int, length: int, block: int, count: int, generator: torch.Generator
) -> tuple[Hidden, Int[Tensor, " B"]]:
    """The random context model: `count` sequences of tokens N(0, I / d), the last one of unit length, and where it also stands.

    That is anywhere in the blocks before its own.
    """
    x = torch.randn(count, length, width, generator=generator) / math.sqrt(width)
    x[:, -1] = F.normalize(x[:, -1], dim=-1)
    earlier = (length - 1) // block * block
    place = torch.randint(earlier, (count,), generator=generator)
    x[torch.arange(count), place] = x[:, -1]
    return x, place


def wrong_block_bound(width: int, length: int, block: int) -> float:
    """Bounds how often a box filter's landmarks mislead in the random context model: (L / B) exp(-d / (2 (2 B - 1))) / 2."""
    return length / block / 2 * math.exp(-width / (2 * (2 * block - 1)))


def sufficient_width(length: int, block: int, epsilon: float) -> int:
    """Channels with which `wrong_block_bound` is below `epsilon` / 2: d >= 4 B log(L / (B epsilon))."""
    return math.ceil(4 * block * math.log(length / (block * epsilon)))
