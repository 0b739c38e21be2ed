"""L2 normalization against PyTorch's."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from cat.ops.l2norm import EPSILON, l2_normalize
from tests.helpers.reference import assert_matches_reference, close, normal

normalize = partial(F.normalize, dim=-1)


def test_l2_normalize_matches_reference():
    assert_matches_reference(l2_normalize, normalize, normal(2, 3, 5, 7))


def test_zero_vector_stays_zero():
    x = normal(3, 7)
    x[1] = 0
    assert l2_normalize(x)[1].tolist() == [0] * 7
    assert_matches_reference(l2_normalize, normalize, x)


def test_zero_vector_in_half_precision_stays_zero_with_a_finite_gradient():
    x = normal(3, 7).half()
    x[1] = 0
    x.requires_grad_()
    y = l2_normalize(x)
    assert y[1].tolist() == [0] * 7
    torch.testing.assert_close(y[[0, 2]], normalize(x)[[0, 2]])
    (gradient,) = torch.autograd.grad(y[[0, 2]].sum(), x)
    assert gradient.isfinite().all()
    assert gradient[1].tolist() == [0] * 7


@pytest.mark.parametrize("size", [0.5 * EPSILON, 0.999 * EPSILON, 1.001 * EPSILON])
def test_vector_shorter_than_epsilon_is_divided_by_a_constant(size):
    assert_matches_reference(l2_normalize, normalize, size * normalize(normal(3, 7)))


def test_vmap_gives_each_member_its_own_gradients():
    x, cotangent = normal(4, 3, 7), normal(4, 3, 7, seed=1)

    def gradient(x, cotangent):
        return torch.func.vjp(l2_normalize, x)[1](cotangent)[0]

    close(torch.vmap(gradient)(x, cotangent), torch.stack([gradient(*pair) for pair in zip(x, cotangent, strict=True)]))


def test_dtype_is_kept():
    x = normal(3, 7).bfloat16().requires_grad_()
    y = l2_normalize(x)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == torch.bfloat16
