"""Position schemes against their definitions."""

import math

import pytest
import torch

from cat.ops.position import alibi_slopes, gather_positions, rotate, sinusoidal
from tests.helpers.reference import close, normal


def test_rotary_scores_depend_only_on_position_differences():
    length, channels = 11, 6
    q, k = (normal(1, 1, 1, channels, seed=s).expand(1, 1, length, channels) for s in (0, 1))
    scores = (rotate(q) @ rotate(k).mT)[0, 0]
    close(scores[1:, 1:], scores[:-1, :-1])
    distinct = torch.cat([scores[0], scores[1:, 0]]).sort().values.diff()
    assert (distinct > 1e-6).all()


@pytest.mark.parametrize("base", [10_000.0, 100.0])
def test_rotary_rotates_each_channel_pair_by_its_angle(base):
    x = normal(2, 3, 7, 10)
    rotated = rotate(x, base)
    for i in range(7):
        for c in range(5):
            angle = i * base ** (-2 * c / 10)
            pair = torch.complex(x[:, :, i, c], x[:, :, i, c + 5]) * complex(math.cos(angle), math.sin(angle))
            close(rotated[:, :, i, [c, c + 5]], torch.view_as_real(pair))


def test_rotary_at_positions_equals_rotary_of_all_tokens():
    x, positions = normal(2, 3, 7, 10), torch.tensor([[0, 3, 6], [2, 2, 5]])
    close(rotate(gather_positions(x, positions), positions=positions), gather_positions(rotate(x), positions))


def test_gather_positions_of_an_empty_batch():
    assert gather_positions(normal(0, 3, 7, 10), torch.zeros(0, 2, dtype=torch.long)).shape == (0, 3, 2, 10)


def authors_slopes(heads):
    """The function `get_slopes` of the authors' code (github.com/ofirpress/attention_with_linear_biases)."""
    if math.log2(heads).is_integer():
        start = 2 ** (-(2 ** -(math.log2(heads) - 3)))
        return [start * start**i for i in range(heads)]
    closest = 2 ** math.floor(math.log2(heads))
    return authors_slopes(closest) + authors_slopes(2 * closest)[0::2][: heads - closest]


@pytest.mark.parametrize("heads", [1, 2, 3, 4, 5, 6, 8, 12, 16, 17, 31, 32, 40])
def test_slopes_are_those_of_the_authors(heads):
    assert alibi_slopes(heads, normal(1)).tolist() == pytest.approx(authors_slopes(heads), rel=1e-12)


def test_rotary_scale_interpolates_positions():
    x = normal(2, 3, 7, 10)
    close(rotate(x, scale=2.0)[:, :, ::2], rotate(x[:, :, ::2]))


@pytest.mark.parametrize("width", [2, 7])
def test_sinusoidal_alternates_sines_and_cosines(width):
    vectors = sinusoidal(5, width, normal(1))
    for i in range(5):
        for channel in range(width):
            angle = i * 10_000 ** (-2 * (channel // 2) / width)
            expected = math.cos(angle) if channel % 2 else math.sin(angle)
            assert vectors[i, channel].item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_position_schemes_keep_the_dtype(dtype):
    like = normal(1, 1, 3, 4).to(dtype)
    assert {rotate(like).dtype, sinusoidal(3, 5, like).dtype} == {dtype}
