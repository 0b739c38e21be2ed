"""The selective state space (arXiv 2312.00752, equation 2 and algorithm 2), E channels with S numbers of state each:

    h_t = exp(delta_t A) h_{t-1} + delta_t b_t x_t        y_t = <c_t, h_t>

The recurrence is associative, so a chunk of it is summed as a tree, in a number of steps that is logarithmic in its length. On a
GPU the kernel of the package mamba_ssm does the same in one pass, where it is installed.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

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
    """The gradient of a scan is a scan backwards in time, so that the tree itself need not be kept for it."""

    @staticmethod
    def forward(ctx: Any, decay: States, value: States, state: State) -> States:
        states = _tree_scan(decay, value, state)
        ctx.save_for_backward(decay, state, states)
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: States) -> tuple[States, States, State]:
        decay, state, states = ctx.saved_tensors
        # Of value_t: g_t = gradient_t + decay_{t+1} g_{t+1}; the decay rolled round to the last place meets a zero state.
        of_value = _tree_scan(decay.roll(-1, 1).flip(1), gradient.flip(1), torch.zeros_like(state)).flip(1)
        before = torch.cat([state[:, None], states[:, :-1]], dim=1)
        return of_value * before, of_value, of_value[:, 0] * decay[:, 0]


def _tree_scan(decay: States, value: States, state: State) -> States:
    """Pairs of steps are steps of a scan of half the length, which gives every second state; the others are one step more."""
    length = value.shape[1]
    if length == 1:
        return decay * state[:, None] + value
    first, second = slice(0, -1, 2), slice(1, None, 2)
    pairs = _tree_scan(decay[:, first] * decay[:, second], decay[:, second] * value[:, first] + value[:, second], state)
    before = torch.cat([state[:, None], pairs], dim=1)[:, : (length + 1) // 2]
    states = torch.empty_like(value)
    states[:, ::2] = decay[:, ::2] * before + value[:, ::2]
    states[:, 1::2] = pairs
    return states
