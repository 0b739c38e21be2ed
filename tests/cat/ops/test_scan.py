"""Tests of the compiled loops of recurrences against the same recurrences in PyTorch operations."""

import numba
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cat.mixers.delta import op as delta
from cat.mixers.gla import op as gla
from cat.mixers.mamba import op as mamba
from cat.ops.scan import numba_selective, recurrence
from tests.helpers.reference import close, normal

CHUNK, BLOCK = numba_selective.CHUNK, numba_selective.BLOCK
REFERENCES = {"gated": gla._by_chunks, "delta": delta._by_chunks, "selective": mamba._by_tokens}
SHAPES = [(1, 1, 1), (2, 5, 7), (CHUNK, 8, 16), (2 * CHUNK + 3, 17, 5)]
"""Tokens, channels of keys (or of a state of Mamba), and channels of values."""
names = pytest.mark.parametrize("name", REFERENCES)


def inputs(name: str, length: int, keys: int, values: int, batch: int = 2, heads: int = 3) -> list[Tensor]:
    if name == "selective":
        delta = normal(batch, length, values, seed=1).exp()
        a, vectors = -normal(1, values, keys, seed=2).exp(), [normal(batch, length, keys, seed=s) for s in (3, 4)]
        return [normal(batch, length, values), delta, a, *vectors, normal(batch, values, keys, seed=5)]
    q, k, log_decay = (normal(batch, heads, length, keys, seed=s) for s in range(3))
    v, state = normal(batch, heads, length, values, seed=3), normal(batch, heads, keys, values, seed=4)
    if name == "gated":
        return [q, k, -F.softplus(log_decay), v, state]
    beta, rate = (normal(batch, heads, length, 1, seed=s) for s in (5, 6))
    return [q, F.normalize(k, dim=-1), v, beta.sigmoid(), -F.softplus(rate), state]


def by_loops(name: str, *x: Tensor) -> tuple[Tensor, Tensor]:
    reference = REFERENCES[name]
    matrix = name != "selective"
    loops = recurrence.matrix_loops(name, reference, *x) if matrix else recurrence.selective_loops(reference, *x)
    assert loops is not None
    return recurrence.run_recurrence(loops, *x)


def outputs_and_gradients(function, x: list[Tensor]) -> list[Tensor]:
    x = [t.detach().requires_grad_() for t in x]
    outputs = function(*x)
    cotangents = [normal(*y.shape, seed=9).to(y.dtype) for y in outputs]
    return [*outputs, *torch.autograd.grad(outputs, x, cotangents)]


@names
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loops_equal_pytorch_with_a_first_and_a_last_state(name, shape):
    x = inputs(name, *shape)
    close(*(tuple(outputs_and_gradients(f, x)) for f in (lambda *x: by_loops(name, *x), REFERENCES[name])))


def test_channels_of_mamba_are_computed_in_blocks():
    x = inputs("selective", 5, 3, 2 * BLOCK + 3)
    close(*(tuple(outputs_and_gradients(f, x)) for f in (lambda *x: by_loops("selective", *x), REFERENCES["selective"])))


@names
def test_any_memory_layout(name):
    x = inputs(name, 7, 8, 8)
    strided = [t.mT.contiguous().mT for t in x]
    close(by_loops(name, *strided), by_loops(name, *x))


@names
def test_the_number_of_threads_changes_no_bit(name):
    x = [t.float() for t in inputs(name, 2 * CHUNK + 3, 8, BLOCK + 1)]
    alone = outputs_and_gradients(lambda *x: by_loops(name, *x), x)
    torch.set_num_threads(3)
    try:
        together = outputs_and_gradients(lambda *x: by_loops(name, *x), x)
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


@names
def test_gradients_of_gradients(name):
    x = [t.requires_grad_() for t in inputs(name, 3, 2, 2, batch=1, heads=1)]
    assert torch.autograd.gradgradcheck(lambda *x: by_loops(name, *x), x, fast_mode=True)


@names
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e4])
def test_a_long_sequence_in_float32_is_close_to_float64(name, size):
    x = inputs(name, 4096, 4, 4, batch=1, heads=1)
    decay = {"gated": 2, "delta": 4, "selective": 2}[name]
    x[decay] = size * x[decay]
    exact = by_loops(name, *x)
    single = outputs_and_gradients(lambda *x: by_loops(name, *x), [t.float() for t in x])
    assert all(t.isfinite().all() for t in single)
    for rough, expected in zip(single, exact, strict=False):
        assert (rough - expected).abs().max() < 1e-4 * expected.abs().max()


@names
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_reach_the_same_outputs(name, value):
    naive = {
        "gated": lambda q, k, log_decay, v: gla.naive_gated_linear_attend(q, k, v, log_decay, scale=1.0),
        "delta": lambda q, k, v, beta, rate: delta.naive_delta_rule(q, k, v, beta[..., 0], rate[..., 0]),
        "selective": lambda x, delta, a, b, c: mamba.naive_selective_scan(x, delta, a[0], b, c),
    }[name]
    for index in range(len(inputs(name, 9, 3, 2)) - 1):
        *x, state = inputs(name, 9, 3, 2)
        x[index].view(-1)[4] = value
        y = by_loops(name, *x, torch.zeros_like(state))[0]
        assert torch.equal(y.isfinite(), naive(*x).isfinite()), f"input {index}"


@names
def test_a_sequence_that_is_not_finite_leaves_the_others_as_they_are(name):
    x = inputs(name, 5, 3, 3)
    values = outputs_and_gradients(lambda *x: by_loops(name, *x), x)
    for index in (0, 1, 3):
        wrong = [t.clone() for t in x]
        wrong[index][0, ...] = float("inf")
        others = outputs_and_gradients(lambda *x: by_loops(name, *x), wrong)
        for expected, actual in zip(values, others, strict=True):
            assert torch.equal(actual[1:], expected[1:])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_exp_is_exact_to_the_rounding(dtype):
    @numba.njit(error_model="numpy")
    def fill(z, out):
        for i in range(len(z)):
            out[i] = numba_selective._exp(z[i])

    limit = {np.float32: 87, np.float64: 708}[dtype]
    z = np.linspace(-limit, limit, 10007).astype(dtype)
    special = np.array([0, 1e9, -1e9, np.inf, -np.inf, np.nan], dtype)
    out, ends = np.empty_like(z), np.empty_like(special)
    fill(z, out)
    fill(special, ends)
    assert np.max(np.abs(out / np.exp(z.astype(np.longdouble)) - 1)) < 1.5 * np.finfo(dtype).eps
    assert ends.tolist()[:5] == [1, np.inf, 0, np.inf, 0]
    assert np.isnan(ends[5])
