"""Vectors of unit length against PyTorch's own."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from cat.ops.l2norm import LEAST, l2_normalize
from tests.helpers.reference import assert_twins, close, normal

normalize = partial(F.normalize, dim=-1)


def test_a_unit_vector_and_its_gradient_are_those_of_pytorch():
    assert_twins(l2_normalize, normalize, normal(2, 3, 5, 7))


def test_a_vector_of_zeros_stays_one():
    x = normal(3, 7)
    x[1] = 0
    assert l2_normalize(x)[1].tolist() == [0] * 7
    assert_twins(l2_normalize, normalize, x)


def test_zeros_in_half_precision_stay_zeros_and_have_no_gradient_of_nan():
    x = normal(3, 7).half()
    x[1] = 0
    x.requires_grad_()
    y = l2_normalize(x)
    assert y[1].tolist() == [0] * 7
    torch.testing.assert_close(y[[0, 2]], normalize(x)[[0, 2]])
    (gradient,) = torch.autograd.grad(y[[0, 2]].sum(), x)
    assert gradient.isfinite().all()
    assert gradient[1].tolist() == [0] * 7


@pytest.mark.parametrize("size", [0.5 * LEAST, 0.999 * LEAST, 1.001 * LEAST])
def test_a_vector_that_is_too_short_is_divided_by_a_constant(size):
    assert_twins(l2_normalize, normalize, size * normalize(normal(3, 7)))


def test_replicas_have_the_gradients_that_each_has_alone():
    x, cotangent = normal(4, 3, 7), normal(4, 3, 7, seed=1)

    def gradient(x, cotangent):
        return torch.func.vjp(l2_normalize, x)[1](cotangent)[0]

    close(torch.vmap(gradient)(x, cotangent), torch.stack([gradient(*pair) for pair in zip(x, cotangent, strict=True)]))


def test_rounded_numbers_keep_their_type():
    x = normal(3, 7).bfloat16().requires_grad_()
    y = l2_normalize(x)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == torch.bfloat16
