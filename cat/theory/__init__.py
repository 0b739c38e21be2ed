"""Constructions with hand-set weights that solve the tasks without training.

    recall       q_i = sum_{j < N} a^j x_{i-j}    k_i = q_{i-1}              QK normalisation, temperature c         theorem 1
    copying      q_i = sum_j rho^j x_{i-j}        k_i = x_i                  score -c <q, k>, noise keys are 2 x separator
    retrieval    q_i = x_i                        k_i = sum_{j < B} x_{i-j}  at the end of a block: its landmark

These are the paper's (arXiv 2407.05591). Others do the same with the convolution elsewhere (`placement`). All are one layer
without positions, and all use v_i = x_i. Tokens are one-hot in the first channels of the residual stream. Attention writes its
output to the last channels, which the head maps to logits.
"""

from __future__ import annotations

from cat.config import ConstructionPlacement
from cat.model import SequenceModel
from cat.tasks.base import Task
from cat.tasks.copying import Copying
from cat.tasks.recall import Recall
from cat.theory.copying import copying, copying_margin
from cat.theory.landmarks import block_retrieval, random_context, sufficient_width, wrong_block_bound
from cat.theory.one_layer import error_bound, temperature
from cat.theory.recall import ngram_margin, recall

__all__ = [
    "block_retrieval",
    "construct",
    "copying",
    "copying_margin",
    "error_bound",
    "ngram_margin",
    "random_context",
    "recall",
    "sufficient_width",
    "temperature",
    "wrong_block_bound",
]


def construct(task: Task, placement: ConstructionPlacement | None = None) -> SequenceModel:
    """Return the construction that solves `task` at all its lengths, by default the paper's.

    Raises ValueError if there is none.
    """
    task.check_construction(placement)
    length = task.lengths[-1]
    if isinstance(task, Recall):
        return recall(vocabulary=task.vocabulary, ngram=task.ngram, length=length, placement=placement or "qk")
    assert isinstance(task, Copying)
    return copying(alphabet=task.alphabet, noise=task.noise, length=length, placement=placement or "q")
