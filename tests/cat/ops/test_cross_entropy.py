"""The loss against PyTorch's, and what it does with answers that are not asked."""

import pytest
import torch

from cat.ops.cross_entropy import cross_entropy, naive_cross_entropy
from cat.tasks.base import IGNORE
from tests.helpers.reference import assert_twins, normal


@pytest.fixture(autouse=True)
def _however_few(monkeypatch):
    monkeypatch.setattr("cat.ops.cross_entropy.FEW", 0)


@pytest.mark.parametrize("answers", [[4], [IGNORE], [0, 4, IGNORE, 2, 2, IGNORE, 1], [IGNORE, 3, 0]])
def test_the_loss_is_that_of_pytorch(answers):
    answers, logits = torch.tensor(answers), 7 * normal(len(answers), 5)
    assert_twins(lambda z: 3 * cross_entropy(z, answers), lambda z: 3 * naive_cross_entropy(z, answers), logits)


def test_an_answer_of_no_probability_costs_its_logit():
    logits = torch.tensor([[0.0, 1e4]], requires_grad=True)
    loss = cross_entropy(logits, torch.tensor([0]))
    loss.backward()
    assert loss.item() == 1e4
    assert logits.grad is not None
    assert logits.grad.tolist() == [[-1.0, 1.0]]


def test_the_loss_is_mapped_over_logits_and_answers():
    answers = torch.tensor([[0, 4, IGNORE], [IGNORE, IGNORE, 1]])

    def one_by_one(logits):
        return torch.stack([naive_cross_entropy(*row) for row in zip(logits, answers, strict=True)])

    assert_twins(lambda logits: torch.vmap(cross_entropy)(logits, answers), one_by_one, normal(2, 3, 5))


def test_what_became_the_gradient_is_not_taken_for_a_probability_again():
    logits = normal(3, 5).requires_grad_()
    loss = cross_entropy(logits, torch.tensor([0, 4, IGNORE]))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
