"""Nats from logits to answers, sum_n log sum_v exp(z_nv) - z_{n, answer_n}, whose gradient is made where it is needed anyway.

The passes over all logits are most of a step where the vocabulary is large, and memory that is new to the process costs more
than they do: the logarithms of the probabilities become the probabilities, and these become the gradient.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from cat.tasks.base import IGNORE

Logits = Float[Tensor, "N V"]
Answers = Int[Tensor, " N"]


def cross_entropy(logits: Logits, answers: Answers) -> Float[Tensor, ""]:
    """Summed over the answers that are not IGNORE. There is one backward pass, the same graph cannot be gone through again."""
    return _CrossEntropy.apply(logits, answers.clamp(min=0)[:, None], (answers != IGNORE).to(logits.dtype)[:, None])[0]


def naive_cross_entropy(logits: Logits, answers: Answers) -> Float[Tensor, ""]:
    """PyTorch's; the twin that `cross_entropy` is tested against."""
    return F.cross_entropy(logits, answers, ignore_index=IGNORE, reduction="sum")


class _CrossEntropy(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Logits, answers: Tensor, asked: Tensor) -> tuple[Tensor, Logits]:
        logarithms = torch.log_softmax(logits, -1)
        loss = -(logarithms.gather(1, answers) * asked).sum()
        return loss, logarithms.exp_().scatter_add_(1, answers, -torch.ones_like(asked))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: tuple[Tensor, Logits]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(inputs[2], output[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: None) -> tuple[Logits, None, None]:
        asked, of_logits = ctx.saved_tensors
        return of_logits.mul_(asked * gradient), None, None
