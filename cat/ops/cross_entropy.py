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

from cat.ops.common import Operation
from cat.tasks.base import IGNORE

FEW = 1 << 18
"""Logits up to which PyTorch's own is faster, on a CPU by a tenth of a millisecond."""

Logits = Float[Tensor, "N V"]
Answers = Int[Tensor, " N"]


def cross_entropy(logits: Logits, answers: Answers) -> Float[Tensor, ""]:
    """Summed over the answers that are not IGNORE. There is one backward pass, the same graph cannot be gone through again."""
    if logits.numel() <= FEW:
        return naive_cross_entropy(logits, answers)
    return _CrossEntropy.apply(logits, answers)[0]


def naive_cross_entropy(logits: Logits, answers: Answers) -> Float[Tensor, ""]:
    """PyTorch's; the twin that `cross_entropy` is tested against."""
    return F.cross_entropy(logits, answers, ignore_index=IGNORE, reduction="sum")


class _CrossEntropy(Operation):
    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Logits, answers: Answers) -> tuple[Tensor, Logits, Tensor]:
        """The loss, its gradient in the rows that are asked, and which they are."""
        logarithms, asked = torch.log_softmax(logits, -1), (answers != IGNORE).to(logits.dtype)[:, None]
        loss = F.nll_loss(logarithms, answers, ignore_index=IGNORE, reduction="sum")
        return loss, logarithms.exp_().scatter_add_(1, answers.clamp(min=0)[:, None], -asked), asked

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Logits, Answers], output: tuple[Tensor, Logits, Tensor]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: None) -> tuple[Logits, None]:
        of_logits, asked = ctx.saved_tensors
        return of_logits.mul_(asked * gradient), None
