"""Runs of n tokens as numbers: equal where the runs are, so that sorting finds what occurs again."""

from __future__ import annotations

import numpy as np

TRAINING_AT_ONCE = 1 << 20
"""Tokens of a long text that are packed at a time."""


def check_packing(vocabulary: int, n: int) -> None:
    """Raises ValueError, in words, where so many different runs of n tokens have no 64-bit numbers of their own."""
    if n > 64 or vocabulary**n > 1 << 64:
        raise ValueError(f"ngram = {n - 1} with {vocabulary:,} different tokens: {n} of them in a row do not fit in 64 bits")


def pack(tokens: np.ndarray, n: int, vocabulary: int) -> np.ndarray:
    """The run of n tokens that begins at each place of the last axis: as the digits of a number to the base `vocabulary`."""
    places = tokens.shape[-1] - n + 1
    packed = np.zeros((*tokens.shape[:-1], places), dtype=np.uint64)
    for offset in range(n):
        packed *= np.uint64(vocabulary)
        packed += tokens[..., offset : offset + places]
    return packed


def stood_before(packed: np.ndarray) -> np.ndarray:
    """Whether each entry of a row stands earlier in it as well, N x M."""
    order = packed.argsort(axis=1, kind="stable")
    ranked = np.take_along_axis(packed, order, axis=1)
    again = np.zeros(packed.shape, dtype=bool)
    np.put_along_axis(again, order[:, 1:], ranked[:, 1:] == ranked[:, :-1], axis=1)
    return again


def occurs(packed: np.ndarray, text: np.ndarray, n: int, vocabulary: int) -> np.ndarray:
    """Whether each of the runs is one of the text, which may be long."""
    runs, places = np.unique(packed, return_inverse=True)
    found = np.zeros(len(runs), dtype=bool)
    for start in range(0, len(text) - n + 1, TRAINING_AT_ONCE):
        found |= np.isin(runs, pack(text[start : start + TRAINING_AT_ONCE + n - 1], n, vocabulary))
    return found[places].reshape(packed.shape)
