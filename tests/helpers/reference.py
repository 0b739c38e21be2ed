"""Compare an operation with its reference implementation."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cat.model import SequenceModel
from cat.types import Tokens


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal values in float64, the same at every call. The global random state is not used."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive_continuation(model: SequenceModel, prompt: Tokens, count: int) -> Tokens:
    """Reference implementation of greedy decoding: `count` tokens, each from a full forward pass without a cache."""
    tokens = prompt
    for _ in range(count):
        tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], dim=1)
    return tokens[:, prompt.shape[1] :]


def in_parts(
    step: Callable[..., tuple[Tensor, Any]], inputs: Sequence[Tensor], parts: list[int], *, dim: int
) -> tuple[Tensor, Any]:
    """Apply `step(*inputs, state=...)` to consecutive parts of the tokens. Returns the outputs and the last state."""
    state, outputs = None, []
    for part in zip(*(x.split(parts, dim=dim) for x in inputs), strict=True):
        out, state = step(*part, state=state)
        outputs.append(out)
    return torch.cat(outputs, dim=dim), state


def assert_matches_reference(operation: Callable[..., Tensor], naive: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Assert that both functions agree on `inputs`: the output and the gradient of every input."""
    inputs = tuple(x.detach().requires_grad_() for x in inputs)
    actual, expected = operation(*inputs), naive(*inputs)
    close(actual, expected)
    cotangent = normal(*expected.shape, seed=99)
    gradients = [torch.autograd.grad(y, inputs, cotangent, materialize_grads=True) for y in (actual, expected)]
    close(*gradients)


def close(actual: Tensor | tuple[Tensor, ...], expected: Tensor | tuple[Tensor, ...]) -> None:
    """Assert equality up to the rounding of float64."""
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)
