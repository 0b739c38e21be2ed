"""The selective state space (arXiv 2312.00752, equation 2 and algorithm 2), E channels with S numbers of state each:

    h_t = exp(delta_t A) h_{t-1} + delta_t b_t x_t        y_t = <c_t, h_t>

What is of the size of a state is computed for a few tokens at a time, and computed anew for the gradient: only the states
themselves are kept for it. On a GPU the kernel of the package mamba_ssm does the same in one pass, where it is installed.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from cat.ops.common import Operation, merge_vmap_dim

NUMBERS_AT_ONCE = {"cpu": 1 << 17, "cuda": 1 << 24}
"""In the states of a chunk of tokens: on a CPU, so few that they stay in the cache of a core."""

Inner = Float[Tensor, "B L E"]
Rates = Float[Tensor, "E S"]
Vectors = Float[Tensor, "B L S"]
State = Float[Tensor, "B E S"]


def selective_scan(x: Inner, delta: Inner, a: Rates, b: Vectors, c: Vectors) -> Inner:
    """The outputs y of `x` with step sizes `delta` > 0, rates `a` < 0, input and output vectors `b` and `c`."""
    # In the precision of `a`, a weight: under autocast the inputs have less, and a state adds many of them up.
    x, delta, b, c = (t.to(a.dtype) for t in (x, delta, b, c))
    if kernel := fused_scan(a.device.type, a.dtype, a.shape[1]):
        return kernel(x.mT, delta.mT, a, b.mT, c.mT).mT
    return _scan(x, delta, a, b, c, x.new_zeros(len(x), *a.shape))[0]


def selective_scan_next(x: Inner, delta: Inner, a: Rates, b: Vectors, c: Vectors, *, state: State | None) -> tuple[Inner, State]:
    """The outputs of tokens that follow upon those of `state`, None before the first one; and the state after all of them."""
    x, delta, b, c = (t.to(a.dtype) for t in (x, delta, b, c))
    return _scan(x, delta, a, b, c, x.new_zeros(len(x), *a.shape) if state is None else state)


def _scan(x: Inner, delta: Inner, a: Rates, b: Vectors, c: Vectors, start: State) -> tuple[Inner, State]:
    y, end, _ = _Scan.apply(x, delta, a.expand(len(x), -1, -1), b, c, start, torch.is_grad_enabled())
    return y, end


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


class _Scan(Operation):
    """One operation a token, on the states of all sequences; its gradient is a scan backwards in time.

    The rates are those of each sequence, (B, E, S). Within, tokens come first and channels last: states are (L, B, S, E).
    """

    @staticmethod
    def forward(
        x: Inner, delta: Inner, a: Tensor, b: Vectors, c: Vectors, start: State, keep: bool
    ) -> tuple[Inner, State, Tensor]:
        """The outputs, the last state, and the states from h_0 = `start` on, or nothing of use without `keep`."""
        x, delta, b, c = (_tokens_first(t) for t in (x, delta, b, c))
        a, y, inputs, end = a.mT.contiguous(), torch.empty_like(x), delta * x, start
        chunks = _chunks(len(x), a)
        decays = a.new_empty(chunks[0].stop, *a.shape)
        states = a.new_empty(1 + (len(x) if keep else len(decays)), *a.shape)
        states[0] = start.mT
        each_decay, each_state = decays.unbind(), states.unbind()
        for chunk in chunks:
            first, size = chunk.start if keep else 0, chunk.stop - chunk.start
            new = torch.mul(b[chunk].mT, inputs[chunk], out=states[first + 1 :][:size])
            torch.mul(delta[chunk], a, out=decays[:size]).exp_()
            each_new = each_state[first + 1 : first + size + 1]
            for state, decay, before in zip(each_new, each_decay, each_state[first:], strict=False):
                state.addcmul_(decay, before)
            torch.matmul(c[chunk], new, out=y[chunk])
            if not keep:
                states[0] = new[-1]
            end = new[-1].mT
        return _tokens_second(y), end.clone(), states

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Inner, State, Tensor]) -> None:
        ctx.mark_non_differentiable(output[2])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:5], output[2])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Inner | None, of_end: State | None, _: None) -> tuple[Tensor | None, ...]:
        x, *others, states = ctx.saved_tensors
        gradient = torch.zeros_like(x) if gradient is None else gradient
        of_end = states.new_zeros(states.shape[1:]).mT if of_end is None else of_end
        return *_ScanGradients.apply(x, *others, states, gradient, of_end), None

    @staticmethod
    def vmap(info: Any, mapped: tuple[int | None, ...], *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[int, int, int]]:
        batches = [merge_vmap_dim(x, axis, info.batch_size, into=0) for x, axis in zip(inputs[:-1], mapped, strict=False)]
        y, end, states = _Scan.apply(*batches, inputs[-1])
        y, end, states = (t.unflatten(axis, (info.batch_size, -1)) for t, axis in zip((y, end, states), (0, 0, 1), strict=True))
        return (y, end, states), (0, 0, 1)


class _ScanGradients(Operation):
    """Those of `_Scan`; an operation too, or torch.vmap would not take gradients of one sequence after the other."""

    @staticmethod
    def forward(
        x: Inner, delta: Inner, a: Tensor, b: Vectors, c: Vectors, states: Tensor, gradient: Inner, of_end: State
    ) -> tuple[Tensor, ...]:
        x, delta, b, c, of_y = (_tokens_first(t) for t in (x, delta, b, c, gradient))
        a, inputs = a.mT.contiguous(), delta * x
        of_x, of_delta, of_b, of_c = (torch.empty_like(t) for t in (x, delta, b, c))
        of_a, later = torch.zeros_like(a), of_end.mT.clone(memory_format=torch.contiguous_format)
        chunks = _chunks(len(x), a)
        decays = a.new_empty(chunks[0].stop, *a.shape)
        # Of state t: g_t = c_t of_y_t + decay_{t+1} g_{t+1}.
        of_states = torch.empty_like(decays)
        each = of_states.unbind()
        steps = list(zip(each, decays.unbind()[1:], each[1:], strict=False))[::-1]
        for chunk in reversed(chunks):
            size = chunk.stop - chunk.start
            decay = torch.mul(delta[chunk], a, out=decays[:size]).exp_()
            g = torch.mul(c[chunk].mT, of_y[chunk], out=of_states[:size])
            g[-1] += later
            for its_g, its_decay, its_later in steps[len(steps) + 1 - size :]:
                its_g.addcmul_(its_decay, its_later)
            torch.mul(decay[0], g[0], out=later)
            torch.matmul(of_y[chunk], states[1:][chunk].mT, out=of_c[chunk])
            torch.matmul(inputs[chunk], g.mT, out=of_b[chunk])
            torch.matmul(b[chunk], g, out=of_x[chunk])
            of_rate = g.mul_(states[chunk]).mul_(decay)  # of delta_t a
            torch.sum(torch.mul(of_rate, a, out=decay), 2, keepdim=True, out=of_delta[chunk])
            of_a += of_rate.mul_(delta[chunk]).sum(0)
        of_delta.addcmul_(of_x, x)
        of_x *= delta
        of_x, of_delta, of_b, of_c = (_tokens_second(t) for t in (of_x, of_delta, of_b, of_c))
        return of_x, of_delta, of_a.mT, of_b, of_c, later.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(info: Any, mapped: tuple[int | None, ...], *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        into = (0, 0, 0, 0, 0, 1, 0, 0)
        folded = (merge_vmap_dim(x, axis, info.batch_size, into=to) for x, axis, to in zip(inputs, mapped, into, strict=True))
        gradients = _ScanGradients.apply(*folded)
        return tuple(gradient.unflatten(0, (info.batch_size, -1)) for gradient in gradients), (0,) * len(gradients)


def _tokens_first(x: Float[Tensor, "B L N"]) -> Float[Tensor, "L B 1 N"]:
    return x.transpose(0, 1)[:, :, None].contiguous()


def _tokens_second(x: Float[Tensor, "L B 1 N"]) -> Float[Tensor, "B L N"]:
    return x[:, :, 0].transpose(0, 1)


def _chunks(length: int, state: Tensor) -> list[slice]:
    """The first is not shorter than any."""
    size = max(1, NUMBERS_AT_ONCE.get(state.device.type, NUMBERS_AT_ONCE["cuda"]) // max(1, state.numel()))
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]
