"""N-grams packed into integers, so that sorting finds repetitions."""

from __future__ import annotations

import numpy as np

CHUNK_TOKENS = 1 << 20
"""Tokens of a long text that are packed at a time, to bound memory."""


def check_packing(vocabulary: int, n: int) -> None:
    """Raises ValueError if the n-grams of this vocabulary do not all fit in 64 bits."""
    if n > 64 or vocabulary**n > 1 << 64:
        raise ValueError(f"ngram = {n - 1} is too long: {n} tokens from a vocabulary of {vocabulary:,} do not fit in 64 bits")


def pack(tokens: np.ndarray, n: int, vocabulary: int) -> np.ndarray:
    """Pack the n-gram that starts at each position of the last axis into an integer with base `vocabulary`."""
    positions = tokens.shape[-1] - n + 1
    packed = np.zeros((*tokens.shape[:-1], positions), dtype=np.uint64)
    for offset in range(n):
        packed *= np.uint64(vocabulary)
        packed += tokens[..., offset : offset + positions]
    return packed


def occurs_earlier(packed: np.ndarray) -> np.ndarray:
    """Whether each entry also occurs earlier in its row, N x M."""
    order = packed.argsort(axis=1, kind="stable")
    ranked = np.take_along_axis(packed, order, axis=1)
    again = np.zeros(packed.shape, dtype=bool)
    np.put_along_axis(again, order[:, 1:], ranked[:, 1:] == ranked[:, :-1], axis=1)
    return again


def occurs(packed: np.ndarray, text: np.ndarray, n: int, vocabulary: int) -> np.ndarray:
    """Whether each packed n-gram occurs in `text`, which may be long."""
    ngrams, inverse = np.unique(packed, return_inverse=True)
    found = np.zeros(len(ngrams), dtype=bool)
    for start in range(0, len(text) - n + 1, CHUNK_TOKENS):
        found |= np.isin(ngrams, pack(text[start : start + CHUNK_TOKENS + n - 1], n, vocabulary))
    return found[inverse].reshape(packed.shape)


def occurs_elsewhere(packed: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Find the n-grams that start at `starts`, N x K, elsewhere in their rows of N x M packed n-grams.

    Returns the row, the position and the number from 0 to K - 1 of every occurrence. The n-grams of a row must be distinct.
    """
    rows = np.arange(len(packed))[:, None]
    different, key = np.unique(packed[rows, starts], return_inverse=True)
    nearest = np.minimum(np.searchsorted(different, packed), len(different) - 1)
    is_key = different[nearest] == packed
    is_key[rows, starts] = False
    row, position = np.nonzero(is_key)
    own = (rows * len(different) + key.reshape(starts.shape)).ravel()  # a number for each key of each sequence
    found, order = row * len(different) + nearest[is_key], own.argsort()
    place = np.minimum(np.searchsorted(own, found, sorter=order), len(own) - 1)
    is_own = own[order[place]] == found
    return row[is_own], position[is_own], order[place[is_own]] % starts.shape[1]
