"""The selective state space (arXiv 2312.00752, equation 2 and algorithm 2), E channels with S numbers of state each:

    h_t = exp(delta_t A) h_{t-1} + delta_t b_t x_t        y_t = <c_t, h_t>

A chunk of tokens at a time, so that memory does not grow with the sequence. On a GPU the kernel of the package mamba_ssm does the
same in one pass, where it is installed.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from cat.folding import fold

CHUNK = 16
"""Tokens whose states are in memory at a time; only the last one's is carried on."""

Inner = Float[Tensor, "B L E"]
Rates = Float[Tensor, "E S"]
Vectors = Float[Tensor, "B L S"]
States = Float[Tensor, "B L E S"]
State = Float[Tensor, "B E S"]


def selective_scan(x: Inner, delta: Inner, a: Rates, b: Vectors, c: Vectors) -> Inner:
    """The outputs y of `x` with step sizes `delta` > 0, rates `a` < 0, input and output vectors `b` and `c`."""
    if kernel := fused_scan(a.device.type, a.dtype, a.shape[1]):
        x, delta, b, c = (t.to(a.dtype).mT for t in (x, delta, b, c))
        return kernel(x, delta, a, b, c).mT
    state = a.new_zeros(x.shape[0], *a.shape)
    outputs = []
    for x_, delta_, b_, c_ in zip(*(t.split(CHUNK, dim=1) for t in (x, delta, b, c)), strict=True):
        decay = torch.exp(delta_[..., None] * a)
        # In the precision of `a`, a weight: under autocast the inputs have less, and a state adds many of them up.
        states = scan(decay, (delta_ * x_).to(a.dtype)[..., None] * b_[:, :, None], state)
        outputs.append((states @ c_[..., None])[..., 0])
        state = states[:, -1]
    return torch.cat(outputs, dim=1)


def naive_selective_scan(x: Inner, delta: Inner, a: Rates, b: Vectors, c: Vectors) -> Inner:
    """The definition, one token at a time; the twin that `selective_scan` is tested against."""
    state = x.new_zeros(x.shape[0], *a.shape)
    outputs = []
    for t in range(x.shape[1]):
        step = delta[:, t, :, None]
        state = torch.exp(step * a) * state + step * b[:, t, None, :] * x[:, t, :, None]
        outputs.append((state * c[:, t, None, :]).sum(-1))
    return torch.stack(outputs, dim=1)


@functools.cache
def fused_scan(device: str, dtype: torch.dtype, size: int) -> Callable[..., Tensor] | None:
    """mamba_ssm's kernel, f(x, delta, a, b, c) with L as the last axis, where it is there and takes states of `size` numbers."""
    if device != "cuda" or dtype != torch.float32 or size > 256:
        return None
    try:
        return importlib.import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn
    except ImportError:
        return None


def scan(decay: States, value: States, state: State) -> States:
    """h_1 .. h_L of h_t = decay_t h_{t-1} + value_t, from h_0 = `state`."""
    return _Scan.apply(decay, value, state)


class _Scan(torch.autograd.Function):
    """One operation a token, each on the states of all sequences; its gradient is a scan backwards in time."""

    @staticmethod
    def forward(decay: States, value: States, state: State) -> States:
        states = torch.empty_like(value)
        for t in range(value.shape[1]):
            state = torch.addcmul(value[:, t], decay[:, t], state, out=states[:, t])
        return states

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[States, States, State], output: States) -> None:
        decay, _, state = inputs
        ctx.save_for_backward(decay, state, output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: States) -> tuple[States, States, State]:
        decay, state, states = ctx.saved_tensors
        # Of value_t: g_t = gradient_t + decay_{t+1} g_{t+1}.
        of_value = torch.empty_like(states)
        of_value[:, -1] = gradient[:, -1]
        for t in range(states.shape[1] - 2, -1, -1):
            torch.addcmul(gradient[:, t], decay[:, t + 1], of_value[:, t + 1], out=of_value[:, t])
        of_decay = torch.empty_like(states)
        torch.mul(of_value[:, 1:], states[:, :-1], out=of_decay[:, 1:])
        torch.mul(of_value[:, 0], state, out=of_decay[:, 0])
        return of_decay, of_value, of_value[:, 0] * decay[:, 0]

    @staticmethod
    def vmap(info: Any, mapped: tuple[int | None, ...], *tensors: Tensor) -> tuple[Tensor, int]:
        batches = (fold(x, axis, info.batch_size, into=0) for x, axis in zip(tensors, mapped, strict=True))
        return _Scan.apply(*batches).unflatten(0, (info.batch_size, -1)), 0
