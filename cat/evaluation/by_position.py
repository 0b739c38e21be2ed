"""What a language model does along its context: its loss by position, and on the answers that stand in the context already."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cat.evaluation.scores import Split, token_scores
from cat.model import SequenceModel

TOKENS = 1 << 15
"""Of the windows in which every position is scored: what that costs does not grow with the test split."""


class ByPosition(NamedTuple):
    """The loss of each of L predictions in nats, the first made after one token; both the same up to the training length T."""

    full: Float[Tensor, "N R"]
    """After all tokens before it, for the R <= L predictions whose context learned positions reach."""
    sliding: Float[Tensor, "N L"]
    """After at most T tokens, as a model is evaluated that reads no further: in windows of T, moved by T // 2."""


class ByRecall(NamedTuple):
    """Shares of all answers, and mean losses in nats an answer, nan where there is none.

    Telling the rare ones apart is how Zoology (arXiv 2312.04927) controls for n-grams that a model has memorised.
    """

    recalled_share: float
    recalled_rare_share: float
    loss_recalled: float
    loss_recalled_rare: float
    loss_others: float


def loss_by_position(model: SequenceModel, windows: Int[Tensor, "N M"], *, precision: str = "float32") -> ByPosition:
    """The loss of `model` on every token but the first of windows of M = L + 1 > T tokens; in float64, on the CPU."""
    trained, length = model.length, windows.shape[1] - 1
    reach = length if model.max_length is None else min(length, model.max_length)
    full = _losses(model, windows[:, : reach + 1], reach, precision)
    pieces, step = [full[:, :trained]], trained // 2
    for begin in range(trained, length, step):
        end = min(begin + step, length)
        pieces.append(_losses(model, windows[:, end - trained : end + 1], end - begin, precision))
    return ByPosition(full, torch.cat(pieces, dim=1))


def _losses(model: SequenceModel, windows: Int[Tensor, "N M"], count: int, precision: str) -> Float[Tensor, "N _"]:
    """Of the last `count` tokens of each window."""
    length = windows.shape[1] - 1
    at = torch.arange(length - count, length, device=windows.device).expand(len(windows), -1)
    split = Split(windows[:, :-1], at, windows[:, -count:])
    return torch.cat([part.loss.double().cpu() for part in token_scores(model, split, precision=precision)])


def sample(count: int, length: int) -> Int[np.ndarray, " n"]:
    """Which of `count` windows of `length` tokens are scored at every position: as many as make TOKENS, evenly spread."""
    most = min(count, max(1, TOKENS // length))
    return np.arange(most) * count // most


def bins(trained: int, length: int) -> list[int]:
    """The last position of each bin, from 1: a quarter of the training length each, one of them ending at that length."""
    quarters = range(1, math.ceil(4 * length / trained))
    return [*(trained * quarter // 4 for quarter in quarters), length]


def loss_by_recall(loss: Float[np.ndarray, "N A"], recalled: Bool[np.ndarray, "N A"], rare: Bool[np.ndarray, "N A"]) -> ByRecall:
    """The losses of N x A answers by whether they are `recalled`, and those `rare`, as cat/tasks/base.py has it."""
    return ByRecall(
        recalled_share=float(recalled.mean()),
        recalled_rare_share=float(rare.mean()),
        loss_recalled=_mean(loss[recalled]),
        loss_recalled_rare=_mean(loss[rare]),
        loss_others=_mean(loss[~recalled]),
    )


def _mean(loss: Float[np.ndarray, " n"]) -> float:
    return float(loss.mean()) if len(loss) else math.nan
