"""AdamW (arXiv 1711.05101, algorithm 2) behind a clip of the gradient's norm, over all parameters laid out in one vector.

A step is a dozen operations however many tensors there are. torch.optim.AdamW computes the same, which a test holds it to, in as
many as there are tensors, and takes most of a second of every process before its first step, for imports that nothing here uses.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

BETAS, EPSILON = (0.9, 0.999), 1e-8


class AdamW:
    """The parameters become views of the vector; they must not be moved to another device or replaced afterwards."""

    def __init__(self, decayed: Sequence[nn.Parameter], others: Sequence[nn.Parameter], *, weight_decay: float, clip: float):
        self.parameters = [*decayed, *others]
        self.weight_decay, self.clip = weight_decay, clip
        self.steps = 0
        self.vector = torch.cat([p.detach().flatten() for p in self.parameters])
        self.decayed = self.vector[: sum(p.numel() for p in decayed)]
        self.mean, self.square = torch.zeros_like(self.vector), torch.zeros_like(self.vector)
        views = self.vector.split([p.numel() for p in self.parameters])
        for parameter, view in zip(self.parameters, views, strict=True):
            parameter.data = view.view_as(parameter)

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Moves the parameters against the gradients that a backward pass has left, and takes those away."""
        gradient = torch.cat([self._taken(p) for p in self.parameters])
        gradient *= (self.clip / (gradient.norm() + 1e-6)).clamp(max=1)
        self.steps += 1
        first, second = BETAS
        self.mean.lerp_(gradient, 1 - first)
        self.square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        self.decayed.mul_(1 - learning_rate * self.weight_decay)
        size = (self.square / (1 - second**self.steps)).sqrt_().add_(EPSILON)
        self.vector.addcdiv_(self.mean, size, value=-learning_rate / (1 - first**self.steps))

    @staticmethod
    def _taken(parameter: nn.Parameter) -> Tensor:
        gradient, parameter.grad = parameter.grad, None
        return parameter.new_zeros(parameter.numel()) if gradient is None else gradient.flatten()
