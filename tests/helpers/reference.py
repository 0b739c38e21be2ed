"""An operation beside its naive twin: what the tests of operations have in common."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cat.model import SequenceModel
from cat.types import Tokens


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers in float64, the same for the same arguments; the global random state is untouched."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive_continuation(model: SequenceModel, prompt: Tokens, count: int) -> Tokens:
    """The `count` tokens that follow upon each prompt, each the most likely one after all before it, which are read anew."""
    read = prompt
    for _ in range(count):
        read = torch.cat([read, model(read)[:, -1:].argmax(-1)], dim=1)
    return read[:, prompt.shape[1] :]


def in_parts(
    step: Callable[..., tuple[Tensor, Any]], inputs: Sequence[Tensor], parts: list[int], *, dim: int
) -> tuple[Tensor, Any]:
    """The outputs and the last state of `step(*inputs, state=...)` of one part of the tokens after the other."""
    state, outputs = None, []
    for part in zip(*(x.split(parts, dim=dim) for x in inputs), strict=True):
        out, state = step(*part, state=state)
        outputs.append(out)
    return torch.cat(outputs, dim=dim), state


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
