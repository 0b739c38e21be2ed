"""The selective state space model (arXiv 2312.00752, equation 2, algorithm 2).

Each of E channels has a state of S numbers:

    h_t = exp(delta_t A) h_{t-1} + delta_t b_t x_t        y_t = <c_t, h_t>

On a CPU, compiled loops store a state every few tokens and recompute the others for the gradient. In PyTorch operations, tensors
with the size of a state are computed for a few tokens at a time and recomputed for the gradient; all states are saved for it. On
a GPU, the kernel of the package mamba_ssm does the same in one pass if it is installed.
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
from cat.ops.scan.recurrence import run_recurrence, selective_loops

MAX_CHUNK_ELEMENTS = {"cpu": 1 << 17, "cuda": 1 << 24}
"""Maximum number of state elements per chunk of tokens; on a CPU, they then fit into the cache of one core."""

Inner = Float[Tensor, "B L E"]
Rates = Float[Tensor, "E S"]
Vectors = Float[Tensor, "B L S"]
State = Float[Tensor, "B E S"]


def selective_scan(x: Inner, delta: Inner, a: Rates, b: Vectors, c: Vectors) -> Inner:
    """Return the outputs y.

    `delta` > 0 are step sizes, `a` < 0 rates, `b` input vectors and `c` output vectors.
    """
    # Computed in the dtype of `a`, a weight: under autocast the inputs have lower precision, and a state is a long sum of them.
    x, delta, b, c = (t.to(a.dtype) for t in (x, delta, b, c))
    if kernel := fused_scan(a.device.type, a.dtype, a.shape[1]):
        return kernel(x.mT, delta.mT, a, b.mT, c.mT).mT
    return _scan(x, delta, a, b, c, x.new_zeros(len(x), *a.shape))[0]


def selective_scan_step(x: Inner, delta: Inner, a: Rates, b: Vectors, c: Vectors, *, state: State | None) -> tuple[Inner, State]:
    """Return the outputs of the tokens after those of `state`, and the new state.

    `state` is None before the first token.
    """
    x, delta, b, c = (t.to(a.dtype) for t in (x, delta, b, c))
    return _scan(x, delta, a, b, c, x.new_zeros(len(x), *a.shape) if state is None else state)


def _scan(x: Inner, delta: Inner, a: Rates, b: Vectors, c: Vectors, start: State) -> tuple[Inner, State]:
    inputs = x, delta, a[None], b, c, start
    if (loops := selective_loops(_by_tokens, *inputs)) is not None:
        return run_recurrence(loops, *inputs)
    a = a.expand(len(x), -1, -1)
    if torch.compiler.is_compiling():
        y, end, _ = torch.ops.cat.selective_scan(x, delta, a, b, c, start)
    else:
        y, end, _ = _Scan.apply(x, delta, a, b, c, start, torch.is_grad_enabled())
    return y, end


def naive_selective_scan(x: Inner, delta: Inner, a: Rates, b: Vectors, c: Vectors) -> Inner:
    """Reference implementation of `selective_scan`, one token at a time."""
    return _by_tokens(x, delta, a[None], b, c, x.new_zeros(x.shape[0], *a.shape))[0]


def _by_tokens(x: Inner, delta: Inner, a: Float[Tensor, "R E S"], b: Vectors, c: Vectors, state: State) -> tuple[Inner, State]:
    outputs = []
    for t in range(x.shape[1]):
        step = delta[:, t, :, None]
        state = torch.exp(step * a) * state + step * b[:, t, None, :] * x[:, t, :, None]
        outputs.append((state * c[:, t, None, :]).sum(-1))
    return torch.stack(outputs, dim=1), state


@functools.cache
def fused_scan(device: str, dtype: torch.dtype, size: int) -> Callable[..., Tensor] | None:
    """Return mamba_ssm's kernel, None if not installed or not supported.

    It supports CUDA, float32 and states of at most 256 numbers. The kernel is f(x, delta, a, b, c) with L as the last axis.
    """
    if device != "cuda" or dtype != torch.float32 or size > 256:
        return None
    try:
        return importlib.import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn
    except ImportError:
        return None


class _Scan(Operation):
    """One operation per token on the states of all sequences.

    The gradient is a scan backwards in time. The rates `a` are per sequence, (B, E, S). Internally, tokens are the first axis and
    channels the last: states (L, B, S, E).
    """

    @staticmethod
    def forward(
        x: Inner, delta: Inner, a: Tensor, b: Vectors, c: Vectors, start: State, keep: bool
    ) -> tuple[Inner, State, Tensor]:
        """Return the outputs, the last state, and the states from h_0 = `start` on.

        Without `keep`, the third output is a scratch buffer.
        """
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
            for state, decay, previous in zip(each_new, each_decay, each_state[first:], strict=False):
                state.addcmul_(decay, previous)
            torch.matmul(c[chunk], new, out=y[chunk])
            if not keep:
                states[0] = new[-1]
            end = new[-1].mT
        return _batch_first(y), end.clone(), states

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Inner, State, Tensor]) -> None:
        ctx.mark_non_differentiable(output[2])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:5], output[2])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Inner | None, grad_end: State | None, _: None) -> tuple[Tensor | None, ...]:
        x, *others, states = ctx.saved_tensors
        grad_y = torch.zeros_like(x) if grad_y is None else grad_y
        grad_end = states.new_zeros(states.shape[1:]).mT if grad_end is None else grad_end
        return *_ScanGradients.apply(x, *others, states, grad_y, grad_end), None

    @staticmethod
    def vmap(info: Any, mapped: tuple[int | None, ...], *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[int, int, int]]:
        batches = [merge_vmap_dim(x, axis, info.batch_size, into=0) for x, axis in zip(inputs[:-1], mapped, strict=False)]
        y, end, states = _Scan.apply(*batches, inputs[-1])
        y, end, states = (t.unflatten(axis, (info.batch_size, -1)) for t, axis in zip((y, end, states), (0, 0, 1), strict=True))
        return (y, end, states), (0, 0, 1)


class _ScanGradients(Operation):
    """Gradients of `_Scan`.

    A separate operation, because torch.vmap of per-sequence gradients needs one.
    """

    @staticmethod
    def forward(
        x: Inner, delta: Inner, a: Tensor, b: Vectors, c: Vectors, states: Tensor, grad_y: Inner, grad_end: State
    ) -> tuple[Tensor, ...]:
        x, delta, b, c, grad_y = (_tokens_first(t) for t in (x, delta, b, c, grad_y))
        a, inputs = a.mT.contiguous(), delta * x
        grad_x, grad_delta, grad_b, grad_c = (torch.empty_like(t) for t in (x, delta, b, c))
        grad_a, later = torch.zeros_like(a), grad_end.mT.clone(memory_format=torch.contiguous_format)
        chunks = _chunks(len(x), a)
        decays = a.new_empty(chunks[0].stop, *a.shape)
        # The gradient of state t: g_t = c_t grad_y_t + decay_{t+1} g_{t+1}.
        grad_states = torch.empty_like(decays)
        each = grad_states.unbind()
        steps = list(zip(each, decays.unbind()[1:], each[1:], strict=False))[::-1]
        for chunk in reversed(chunks):
            size = chunk.stop - chunk.start
            decay = torch.mul(delta[chunk], a, out=decays[:size]).exp_()
            g = torch.mul(c[chunk].mT, grad_y[chunk], out=grad_states[:size])
            g[-1] += later
            for g_t, next_decay, next_g in steps[len(steps) + 1 - size :]:
                g_t.addcmul_(next_decay, next_g)
            torch.mul(decay[0], g[0], out=later)
            torch.matmul(grad_y[chunk], states[1:][chunk].mT, out=grad_c[chunk])
            torch.matmul(inputs[chunk], g.mT, out=grad_b[chunk])
            torch.matmul(b[chunk], g, out=grad_x[chunk])
            grad_rate = g.mul_(states[chunk]).mul_(decay)  # the gradient of delta_t a
            torch.sum(torch.mul(grad_rate, a, out=decay), 2, keepdim=True, out=grad_delta[chunk])
            grad_a += grad_rate.mul_(delta[chunk]).sum(0)
        grad_delta.addcmul_(grad_x, x)
        grad_x *= delta
        grad_x, grad_delta, grad_b, grad_c = (_batch_first(t) for t in (grad_x, grad_delta, grad_b, grad_c))
        return grad_x, grad_delta, grad_a.mT, grad_b, grad_c, later.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(info: Any, mapped: tuple[int | None, ...], *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        into = (0, 0, 0, 0, 0, 1, 0, 0)
        folded = (merge_vmap_dim(x, axis, info.batch_size, into=to) for x, axis, to in zip(inputs, mapped, into, strict=True))
        gradients = _ScanGradients.apply(*folded)
        return tuple(gradient.unflatten(0, (info.batch_size, -1)) for gradient in gradients), (0,) * len(gradients)


# The compiler must not trace the loops over tokens: the operations of these names are one node of the graph, for any length.


@torch.library.custom_op(
    "cat::selective_scan",
    mutates_args=(),
    schema="(Tensor x, Tensor delta, Tensor a, Tensor b, Tensor c, Tensor start) -> (Tensor, Tensor, Tensor)",
)
def _opaque_scan(x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, start: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    y, end, states = _Scan.forward(x, delta, a, b, c, start, True)
    return y.contiguous(), end.contiguous(), states


@torch.library.custom_op(
    "cat::selective_scan_gradients",
    mutates_args=(),
    schema="(Tensor[] saved, Tensor grad_y, Tensor grad_end) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _opaque_gradients(saved: list[Tensor], grad_y: Tensor, grad_end: Tensor) -> tuple[Tensor, ...]:
    x, delta, a, b, c, states = saved
    return tuple(gradient.contiguous() for gradient in _ScanGradients.forward(x, delta, a, b, c, states, grad_y, grad_end))


@_opaque_scan.register_fake
def _(x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, start: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, channels = x.shape
    y, end = x.new_empty(x.shape), start.new_empty(start.shape)
    return y, end, x.new_empty(length + 1, batch, b.shape[2], channels)


@_opaque_gradients.register_fake
def _(saved: list[Tensor], grad_y: Tensor, grad_end: Tensor) -> tuple[Tensor, ...]:
    return *(x.new_empty(x.shape) for x in saved[:5]), grad_end.new_empty(grad_end.shape)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:5], output[2])


def _differentiate(ctx: Any, grad_y: Tensor, grad_end: Tensor, _: Tensor) -> tuple[Tensor, ...]:
    gradients: tuple[Tensor, ...] = torch.ops.cat.selective_scan_gradients(ctx.saved_tensors, grad_y, grad_end)
    return gradients


_opaque_scan.register_autograd(_differentiate, setup_context=_save)


def _tokens_first(x: Float[Tensor, "B L N"]) -> Float[Tensor, "L B 1 N"]:
    return x.transpose(0, 1)[:, :, None].contiguous()


def _batch_first(x: Float[Tensor, "L B 1 N"]) -> Float[Tensor, "B L N"]:
    return x[:, :, 0].transpose(0, 1)


def _chunks(length: int, state: Tensor) -> list[slice]:
    """Split `length` tokens into chunks; none is longer than the first."""
    size = max(1, MAX_CHUNK_ELEMENTS.get(state.device.type, MAX_CHUNK_ELEMENTS["cuda"]) // max(1, state.numel()))
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]
