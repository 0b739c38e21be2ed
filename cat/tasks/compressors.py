"""Compression programs as predictors of text: bytes that a text adds to a compressed archive of another text."""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Callable
from typing import NamedTuple


class Compressor(NamedTuple):
    """A program of the standard library, at its strongest setting."""

    size: Callable[[bytes], int]
    """Size of the compressed text."""
    reach: int
    """Bytes: how far back it finds repetitions. For lzma the bound keeps the time below half a minute."""


COMPRESSORS = {
    "zlib": Compressor(lambda text: len(zlib.compress(text, 9)), 1 << 15),
    "bz2": Compressor(lambda text: len(bz2.compress(text, 9)), 900_000),
    "lzma": Compressor(lambda text: len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)), 1 << 23),
}
"""By name, weakest first."""


def compressed_bits(name: str, text: bytes, known: bytes) -> float:
    """Bits that `text` adds to the compressed end of `known`, as much of it as the program reaches from the end of `text`.

    The difference of two sizes is exact to some hundred bytes, so the text should have many kilobytes.
    """
    size, reach = COMPRESSORS[name]
    known = known[-max(reach - len(text), reach // 2) :]
    return 8.0 * (size(known + text) - size(known))
