"""What the constructions share: a model of one layer with given embeddings and projections, and its temperature."""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from cat.config import ModelConfig
from cat.mixers.qkv import DotProductMixer
from cat.model import SequenceModel
from cat.training.fit import build_model


def temperature(margin: float, length: int, epsilon: float) -> float:
    """Return the temperature c = log(4 L / epsilon) / m, for which `error_bound` is below `epsilon` / 2."""
    return math.log(4 * length / epsilon) / margin


def error_bound(margin: float, length: int, c: float) -> float:
    """Return the bound 2 (L - 1) exp(-c m) on the L1 distance between the attention output and the correct token.

    It holds if the score of the correct token is at least c times `margin` m above all others.
    """
    return 2 * (length - 1) * math.exp(-c * margin)


def one_layer_model(
    config: ModelConfig,
    embedding: Float[Tensor, "V E"],
    *,
    q: Float[Tensor, "_ E"],
    k: Float[Tensor, "_ E"],
    v: Float[Tensor, "A E"],
    decoded: Float[Tensor, "V A"],
    length: int,
) -> tuple[SequenceModel, DotProductMixer]:
    """Build a model of E + A channels, and return it with its mixer.

    The first E channels hold the embedding, ones and zeros, with equally many ones for each token. The last A channels get the
    values, of which `decoded` makes logits. The caller sets the convolutions and the temperature.
    """
    model = build_model(config, vocabulary=len(embedding), length=length, seed=0)
    (block,) = model.layers()
    mixer, width, (outputs, inputs) = cast(DotProductMixer, block.mixer), config.width, v.shape
    model.embedding.token.weight.copy_(F.pad(embedding, (0, outputs)))
    # Make the norm the identity on vectors with r ones, whose mean is r / d and whose variance is r / d - (r / d)^2.
    norm, mean = cast(nn.LayerNorm, block.mixer_norm), embedding[0].sum().item() / width
    norm.weight.fill_(math.sqrt(mean - mean**2 + norm.eps))
    norm.bias.fill_(mean)
    for linear, weight in ((mixer.q_proj, q), (mixer.k_proj, k), (mixer.v_proj, v)):
        linear.weight.copy_(F.pad(weight, (0, width - inputs, 0, width - len(weight))))
    mixer.o_proj.weight.copy_(F.pad(torch.eye(outputs), (0, inputs, inputs, 0)))
    model.head.weight.copy_(F.pad(decoded, (inputs, 0)))
    return model, mixer
