"""AdamW (arXiv 1711.05101, algorithm 2) after clipping of the gradient norm, over all parameters as one vector.

A step takes the same few operations for any number of tensors. A test compares it with torch.optim.AdamW, tensor by tensor. That
class takes most of a second per process before its first step, for imports that are not used here.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim.adamw import adamw

from cat.training.distributed import SINGLE_PROCESS, ProcessGroup

BETAS, EPSILON = (0.9, 0.999), 1e-8


class AdamW:
    """Optimizes `decayed` with weight decay and `others` without.

    The parameters become views of one vector: do not replace them or move them to another device afterwards. `grad_clip` is the
    largest norm of the gradient of all parameters together. The gradient is summed over the processes of `group`.
    """

    def __init__(
        self,
        decayed: Sequence[nn.Parameter],
        others: Sequence[nn.Parameter],
        *,
        weight_decay: float,
        grad_clip: float,
        group: ProcessGroup = SINGLE_PROCESS,
    ):
        self.parameters = [*decayed, *others]
        self.grad_clip, self.group = grad_clip, group
        vector = torch.cat([p.detach().flatten() for p in self.parameters])
        for parameter, view in zip(self.parameters, vector.split([p.numel() for p in self.parameters]), strict=True):
            parameter.data = view.view_as(parameter)
        self.sizes = [sum(p.numel() for p in parameters) for parameters in (decayed, others)]
        self.vectors = [
            _ParameterVector(part, decay) for part, decay in zip(vector.split(self.sizes), (weight_decay, 0.0), strict=True)
        ]

    @torch.no_grad()
    def step(self, learning_rate: float) -> Float[Tensor, ""]:
        """Update the parameters, clear their gradients, and return the gradient norm before clipping."""
        gradient = self.group.all_reduce_sum(torch.cat([_pop_gradient(p) for p in self.parameters]))
        norm = gradient.norm()
        grad_scale = (norm / self.grad_clip).clamp(min=1).float()
        for vector, vector_gradient in zip(self.vectors, gradient.split(self.sizes), strict=True):
            if vector_gradient.numel():
                vector.step(vector_gradient, grad_scale, learning_rate)
        return norm

    @property
    def moments(self) -> Float[Tensor, "2 P"]:
        """A copy of the running means of the gradient and of its square."""
        return torch.stack([torch.cat([v.mean for v in self.vectors]), torch.cat([v.square for v in self.vectors])])

    def resume(self, steps: int, moments: Float[Tensor, "2 P"]) -> None:
        """Restore the moments of an optimizer after `steps` steps."""
        for vector, (mean, square) in zip(self.vectors, moments.split(self.sizes, dim=1), strict=True):
            vector.mean.copy_(mean)
            vector.square.copy_(square)
            vector.steps.fill_(steps)


class _ParameterVector:
    """The parameters with one weight decay as a vector, and their moments."""

    def __init__(self, vector: Tensor, weight_decay: float):
        self.vector, self.weight_decay = vector, weight_decay
        self.mean, self.square = torch.zeros_like(vector), torch.zeros_like(vector)
        self.steps = torch.zeros((), device=vector.device)

    def step(self, gradient: Tensor, grad_scale: Tensor, learning_rate: float) -> None:
        """Apply one fused step; the gradient is divided by `grad_scale`."""
        first, second = BETAS
        adamw(
            [self.vector],
            [gradient],
            [self.mean],
            [self.square],
            [],
            [self.steps],
            fused=True,
            grad_scale=grad_scale,
            amsgrad=False,
            beta1=first,
            beta2=second,
            lr=learning_rate,
            weight_decay=self.weight_decay,
            eps=EPSILON,
            maximize=False,
        )


def _pop_gradient(parameter: nn.Parameter) -> Tensor:
    """Return the flat gradient, or zeros if there is none, and clear it."""
    gradient, parameter.grad = parameter.grad, None
    return parameter.new_zeros(parameter.numel()) if gradient is None else gradient.flatten()
