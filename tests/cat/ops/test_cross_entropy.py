"""Cross-entropy against PyTorch's, with and without ignored targets."""

import pytest
import torch

from cat.ops.cross_entropy import cross_entropy, naive_cross_entropy
from cat.tasks.base import IGNORE
from tests.helpers.reference import assert_matches_reference, normal


@pytest.fixture(autouse=True)
def _always_our_own(monkeypatch):
    monkeypatch.setattr("cat.ops.cross_entropy.MAX_NAIVE_LOGITS", 0)


@pytest.mark.parametrize("targets", [[4], [IGNORE], [0, 4, IGNORE, 2, 2, IGNORE, 1], [IGNORE, 3, 0]])
def test_cross_entropy_matches_reference(targets):
    targets, logits = torch.tensor(targets), 7 * normal(len(targets), 5)
    assert_matches_reference(lambda z: 3 * cross_entropy(z, targets), lambda z: 3 * naive_cross_entropy(z, targets), logits)


def test_target_of_zero_probability_has_a_finite_loss():
    logits = torch.tensor([[0.0, 1e4]], requires_grad=True)
    loss = cross_entropy(logits, torch.tensor([0]))
    loss.backward()
    assert loss.item() == 1e4
    assert logits.grad is not None
    assert logits.grad.tolist() == [[-1.0, 1.0]]


def test_vmap_over_logits_and_targets():
    targets = torch.tensor([[0, 4, IGNORE], [IGNORE, IGNORE, 1]])

    def one_by_one(logits):
        return torch.stack([naive_cross_entropy(*row) for row in zip(logits, targets, strict=True)])

    assert_matches_reference(lambda logits: torch.vmap(cross_entropy)(logits, targets), one_by_one, normal(2, 3, 5))


def test_second_backward_pass_is_refused():
    logits = normal(3, 5).requires_grad_()
    loss = cross_entropy(logits, torch.tensor([0, 4, IGNORE]))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
