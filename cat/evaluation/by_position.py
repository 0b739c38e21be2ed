"""Losses of a language model by position in the context and on answers that the context contains; accuracy by part of a task."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cat.evaluation.scores import Split, TokenScores, token_scores
from cat.model import SequenceModel

TOKENS = 1 << 15
"""Tokens in the windows that are scored at every position. The cost does not grow with the test split."""


class ByPosition(NamedTuple):
    """The loss in nats of each of L predictions; the first one is made after one token.

    The two fields are equal up to the training length T.
    """

    full: Float[Tensor, "N R"]
    """Given all tokens before it. R <= L: with learned positions, only the predictions within their length."""
    sliding: Float[Tensor, "N L"]
    """Given at most T tokens: windows of T tokens with stride T // 2."""


class ByRecall(NamedTuple):
    """Shares of all answers, and mean losses in nats per answer; nan for a class without answers.

    Separating the rare ones controls for n-grams that the model has memorised, as in Zoology (arXiv 2312.04927).
    """

    recalled_share: float
    recalled_rare_share: float
    loss_recalled: float
    loss_recalled_rare: float
    loss_others: float


def loss_by_position(model: SequenceModel, windows: Int[Tensor, "N M"], *, precision: str = "float32") -> ByPosition:
    """Return the loss on every token but the first, in float64 on the CPU.

    Windows have M = L + 1 tokens, more than the training length T.
    """
    trained, length = model.length, windows.shape[1] - 1
    full_length = length if model.max_length is None else min(length, model.max_length)
    full = _losses(model, windows[:, : full_length + 1], full_length, precision)
    pieces, stride = [full[:, :trained]], trained // 2
    for begin in range(trained, length, stride):
        end = min(begin + stride, length)
        pieces.append(_losses(model, windows[:, end - trained : end + 1], end - begin, precision))
    return ByPosition(full, torch.cat(pieces, dim=1))


def _losses(model: SequenceModel, windows: Int[Tensor, "N M"], count: int, precision: str) -> Float[Tensor, "N _"]:
    """Return the losses on the last `count` tokens of each window."""
    length = windows.shape[1] - 1
    positions = torch.arange(length - count, length, device=windows.device).expand(len(windows), -1)
    split = Split(windows[:, :-1], positions, windows[:, -count:])
    return torch.cat([chunk.loss.double().cpu() for chunk in token_scores(model, split, precision=precision)])


def scored_windows(count: int, length: int) -> Int[np.ndarray, " n"]:
    """Return the indices of the windows to score at every position: evenly spaced, TOKENS tokens in all.

    At least one and at most `count` windows of `length` tokens.
    """
    scored = min(count, max(1, TOKENS // length))
    return np.arange(scored) * count // scored


def bin_ends(trained: int, length: int) -> list[int]:
    """Return the last position of each bin, counted from 1.

    A bin is a quarter of the training length; one bin ends at the training length.
    """
    quarters = range(1, math.ceil(4 * length / trained))
    return [*(trained * quarter // 4 for quarter in quarters), length]


def loss_by_recall(loss: Float[np.ndarray, "N A"], recalled: Bool[np.ndarray, "N A"], rare: Bool[np.ndarray, "N A"]) -> ByRecall:
    """Average the losses of N x A answers per class. `Recalled` in cat/tasks/base.py defines `recalled` and `rare`."""
    return ByRecall(
        recalled_share=float(recalled.mean()),
        recalled_rare_share=float(rare.mean()),
        loss_recalled=_mean(loss[recalled]),
        loss_recalled_rare=_mean(loss[rare]),
        loss_others=_mean(loss[~recalled]),
    )


def accuracy_by_part(
    scores: Iterable[TokenScores], positions: Int[np.ndarray, "N A"], parts: Mapping[str, Bool[np.ndarray, "N L"]]
) -> dict[str, float]:
    """Return the share of correct answers of each part: `accuracy_<name>`; nan for a part without answers.

    `positions` are those of the scored answers. `Task.parts` defines the parts.
    """
    correct, is_target = (torch.cat(columns).cpu().numpy() for columns in zip(*(s[1:] for s in scores), strict=True))
    chosen = {name: np.take_along_axis(part, positions, axis=1) & is_target for name, part in parts.items()}
    return {f"accuracy_{name}": _mean(correct[part].astype(np.float64)) for name, part in chosen.items()}


def _mean(loss: Float[np.ndarray, " n"]) -> float:
    return float(loss.mean()) if len(loss) else math.nan
