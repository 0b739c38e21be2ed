"""AdamW (arXiv 1711.05101, algorithm 2) after clipping of the gradient norm.

A compiled loop updates all tensors. A test compares it with torch.optim.AdamW. That class takes most of a second per process
before its first step, for imports that are not used here.
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

    Do not replace the parameters or move them to another device afterwards. `grad_clip` is the largest norm of the gradient of
    all parameters together. The gradient is summed over the processes of `group`.
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
        self.parameters: list[Tensor] = [*decayed, *others]
        self.grad_clip, self.group = grad_clip, group
        self.means, self.squares = ([torch.zeros_like(p) for p in self.parameters] for _ in range(2))
        self.steps = [torch.zeros((), device=p.device) for p in self.parameters]
        kinds = (slice(len(decayed)), weight_decay), (slice(len(decayed), None), 0.0)
        self.kinds = [(kind, decay) for kind, decay in kinds if self.parameters[kind]]

    @torch.no_grad()
    def step(self, learning_rate: float) -> Float[Tensor, ""]:
        """Update the parameters, clear their gradients, and return the gradient norm before clipping."""
        gradients = self._sum_over_group([_pop_gradient(p) for p in self.parameters])
        norm = nn.utils.get_total_norm(gradients)
        grad_scale = (norm / self.grad_clip).clamp(min=1).float()
        for kind, weight_decay in self.kinds:
            adamw(
                self.parameters[kind],
                gradients[kind],
                self.means[kind],
                self.squares[kind],
                [],
                self.steps[kind],
                fused=True,
                grad_scale=grad_scale,
                amsgrad=False,
                beta1=BETAS[0],
                beta2=BETAS[1],
                lr=learning_rate,
                weight_decay=weight_decay,
                eps=EPSILON,
                maximize=False,
            )
        return norm

    @property
    def moments(self) -> Float[Tensor, "2 P"]:
        """A copy of the running means of the gradient and of its square."""
        return torch.stack([torch.cat([x.flatten() for x in moments]) for moments in (self.means, self.squares)])

    def resume(self, steps: int, moments: Float[Tensor, "2 P"]) -> None:
        """Restore the moments of an optimizer after `steps` steps."""
        for tensors, values in zip((self.means, self.squares), moments, strict=True):
            for tensor, part in zip(tensors, values.split([p.numel() for p in self.parameters]), strict=True):
                tensor.copy_(part.view_as(tensor))
        for step in self.steps:
            step.fill_(steps)

    def _sum_over_group(self, gradients: list[Tensor]) -> list[Tensor]:
        """Sum the gradients over all processes, as one vector."""
        if self.group.size == 1:
            return gradients
        vector = self.group.all_reduce_sum(torch.cat([gradient.flatten() for gradient in gradients]))
        parts = vector.split([gradient.numel() for gradient in gradients])
        return [part.view_as(gradient) for part, gradient in zip(parts, gradients, strict=True)]


def _pop_gradient(parameter: Tensor) -> Tensor:
    """Return the gradient, or zeros if there is none, and clear it. The compiled loop needs it in the order of the parameter."""
    gradient, parameter.grad = parameter.grad, None
    return torch.zeros_like(parameter) if gradient is None else gradient.contiguous()
