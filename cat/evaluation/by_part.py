"""Accuracy by part of a task: for example by the number of hops of a query."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from jaxtyping import Bool, Int

from cat.evaluation.scores import TokenScores


def accuracy_by_part(
    scores: Iterable[TokenScores], positions: Int[np.ndarray, "N A"], parts: Mapping[str, Bool[np.ndarray, "N L"]]
) -> dict[str, float]:
    """Return the share of correct answers of each part: `accuracy_<name>`; nan for a part without answers.

    `positions` are those of the scored answers. `Task.parts` defines the parts.
    """
    correct, is_target = (torch.cat(columns).cpu().numpy() for columns in zip(*(s[1:] for s in scores), strict=True))
    chosen = {name: np.take_along_axis(part, positions, axis=1) & is_target for name, part in parts.items()}
    return {f"accuracy_{name}": float(correct[part].mean()) if part.any() else math.nan for name, part in chosen.items()}
