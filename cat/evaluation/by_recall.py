"""Losses of a language model on answers that the context already contains."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float


class ByRecall(NamedTuple):
    """Shares of all answers, and mean losses in nats per answer; nan for a class without answers.

    Separating the rare ones controls for n-grams that the model has memorised, as in Zoology (arXiv 2312.04927).
    """

    recalled_share: float
    recalled_rare_share: float
    loss_recalled: float
    loss_recalled_rare: float
    loss_others: float


def loss_by_recall(loss: Float[np.ndarray, "N A"], recalled: Bool[np.ndarray, "N A"], rare: Bool[np.ndarray, "N A"]) -> ByRecall:
    """Average the losses of N x A answers per class. `Recalled` in cat/tasks/base.py defines `recalled` and `rare`."""
    return ByRecall(
        recalled_share=float(recalled.mean()),
        recalled_rare_share=float(rare.mean()),
        loss_recalled=_mean(loss[recalled]),
        loss_recalled_rare=_mean(loss[rare]),
        loss_others=_mean(loss[~recalled]),
    )


def _mean(loss: Float[np.ndarray, " n"]) -> float:
    return float(loss.mean()) if len(loss) else math.nan
