"""AdamW (arXiv 1711.05101, algorithm 2) behind a clip of the gradient's norm, over all parameters laid out in one vector.

A step is a handful of operations however many tensors there are. torch.optim.AdamW does the same, which a test holds it to,
tensor by tensor; before its first step it takes most of a second of every process, for imports that nothing here uses.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim.adamw import adamw

from cat.training.distributed import SINGLE_PROCESS, ProcessGroup

BETAS, EPSILON = (0.9, 0.999), 1e-8


class AdamW:
    """The parameters become views of the vector; they must not be moved to another device or replaced afterwards.

    Those in `decayed` have weight decay; `clip` is the largest norm of the gradient of all of them together. The gradient is
    the sum of those that the processes of `group` have.
    """

    def __init__(
        self,
        decayed: Sequence[nn.Parameter],
        others: Sequence[nn.Parameter],
        *,
        weight_decay: float,
        clip: float,
        group: ProcessGroup = SINGLE_PROCESS,
    ):
        self.parameters = [*decayed, *others]
        self.grad_clip, self.group = clip, group
        vector = torch.cat([p.detach().flatten() for p in self.parameters])
        for parameter, view in zip(self.parameters, vector.split([p.numel() for p in self.parameters]), strict=True):
            parameter.data = view.view_as(parameter)
        self.sizes = [sum(p.numel() for p in group) for group in (decayed, others)]
        self.parts = [_Part(part, decay) for part, decay in zip(vector.split(self.sizes), (weight_decay, 0.0), strict=True)]

    @torch.no_grad()
    def step(self, learning_rate: float) -> Float[Tensor, ""]:
        """Moves the parameters against the gradients that a backward pass has left, takes these away, and returns their norm."""
        gradient = self.group.all_reduce_sum(torch.cat([_taken(p) for p in self.parameters]))
        norm = gradient.norm()
        excess = (norm / self.grad_clip).clamp(min=1).float()
        for part, its_gradient in zip(self.parts, gradient.split(self.sizes), strict=True):
            if its_gradient.numel():
                part.step(its_gradient, excess, learning_rate)
        return norm

    @property
    def moments(self) -> Float[Tensor, "2 P"]:
        """A copy of what is remembered of the gradients: their mean and their mean square."""
        return torch.stack([torch.cat([part.mean for part in self.parts]), torch.cat([part.square for part in self.parts])])

    def resume(self, steps: int, moments: Float[Tensor, "2 P"]) -> None:
        """Goes on from where another stood after `steps` steps."""
        for part, (mean, square) in zip(self.parts, moments.split(self.sizes, dim=1), strict=True):
            part.mean.copy_(mean)
            part.square.copy_(square)
            part.steps.fill_(steps)


class _Part:
    """The parameters with one weight decay, as a vector, and what the optimizer remembers of their gradients."""

    def __init__(self, vector: Tensor, weight_decay: float):
        self.vector, self.weight_decay = vector, weight_decay
        self.mean, self.square = torch.zeros_like(vector), torch.zeros_like(vector)
        self.steps = torch.zeros((), device=vector.device)

    def step(self, gradient: Tensor, excess: Tensor, learning_rate: float) -> None:
        """One pass over the vectors; the gradient is divided by `excess`."""
        first, second = BETAS
        adamw(
            [self.vector],
            [gradient],
            [self.mean],
            [self.square],
            [],
            [self.steps],
            fused=True,
            grad_scale=excess,
            amsgrad=False,
            beta1=first,
            beta2=second,
            lr=learning_rate,
            weight_decay=self.weight_decay,
            eps=EPSILON,
            maximize=False,
        )


def _taken(parameter: nn.Parameter) -> Tensor:
    gradient, parameter.grad = parameter.grad, None
    return parameter.new_zeros(parameter.numel()) if gradient is None else gradient.flatten()
