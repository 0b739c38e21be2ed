"""Compression programs: what a text costs that repeats another one, or nothing."""

import numpy as np
import pytest

from cat.tasks.compressors import COMPRESSORS, compressed_bits

NOISE = np.random.default_rng(0).integers(0, 256, 200_000, dtype=np.uint8).tobytes()


@pytest.mark.parametrize("name", COMPRESSORS)
def test_a_repetition_within_reach_costs_less_than_noise(name):
    near, far, new = NOISE[-20_000:-12_000], NOISE[:8000], NOISE[8000:16_000][::-1]
    assert compressed_bits(name, near, NOISE) < 6 * len(near)
    assert compressed_bits(name, new, NOISE) == pytest.approx(8 * len(new), rel=0.02)
    is_within_reach = name != "zlib"  # 32 KiB
    assert (compressed_bits(name, far, NOISE) < 6 * len(far)) == is_within_reach
