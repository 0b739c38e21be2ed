"""An operation beside its naive twin: what the tests of operations have in common."""

from collections.abc import Callable

import torch
from torch import Tensor


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers in float64, the same for the same arguments; the global random state is untouched."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_twins(operation: Callable[..., Tensor], naive: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Asserts that the two agree on `inputs`: the output, and the gradient of every input."""
    inputs = tuple(x.detach().requires_grad_() for x in inputs)
    actual, expected = operation(*inputs), naive(*inputs)
    close(actual, expected)
    cotangent = normal(*expected.shape, seed=99)
    gradients = [torch.autograd.grad(y, inputs, cotangent, materialize_grads=True) for y in (actual, expected)]
    close(*gradients)


def close(actual: Tensor | tuple[Tensor, ...], expected: Tensor | tuple[Tensor, ...]) -> None:
    """Asserts equality up to the rounding of float64."""
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)
