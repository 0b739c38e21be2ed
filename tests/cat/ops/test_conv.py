"""Every algorithm and backend of the causal convolution against its reference implementation."""

import hashlib
import os
import subprocess
import sys

import pytest
import torch

from cat.ops.conv import causal, direct, numba_backend, torch_backend
from cat.ops.conv.causal import HEAD_LIMITS, filter_channels, filter_groups, filter_heads, filter_heads_at, mix_heads
from cat.ops.conv.fft import _padded_size
from cat.ops.conv.reference import naive_filter_channels, naive_filter_heads, naive_mix_heads
from cat.ops.conv.toeplitz import toeplitz
from cat.ops.position import gather_positions
from tests.helpers.reference import assert_matches_reference, close, normal

BATCH, HEADS, CHANNELS = 2, 3, 5
SHARING = {
    "head": (filter_heads, naive_filter_heads, (HEADS,), {"direct": "filter_direct", "fft": "filter_fft"}),
    "channel": (filter_channels, naive_filter_channels, (HEADS, CHANNELS), {"direct": "filter_direct", "fft": "filter_fft"}),
    "mixing": (mix_heads, naive_mix_heads, (HEADS, HEADS), {"direct": "mix_direct", "fft": "mix_fft"}),
}


@pytest.fixture
def called(monkeypatch):
    """Names of the algorithms that run, in order."""
    names = []
    toeplitz = dict.fromkeys(("filter_heads_toeplitz", "filter_channels_toeplitz", "mix_toeplitz", "toeplitz"), "toeplitz")
    for name, label in {**toeplitz, **{n: n for n in ("filter_direct", "filter_fft", "mix_direct", "mix_fft")}}.items():
        original = getattr(causal, name)
        monkeypatch.setattr(causal, name, lambda *args, n=label, f=original, **options: names.append(n) or f(*args, **options))
    return names


@pytest.fixture
def no_numba(monkeypatch):
    """Choose algorithms as on a device without a compiled backend."""
    for module in (causal, direct):
        monkeypatch.setattr(module, "uses_numba", lambda x: False)


@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize(
    ("length", "width", "dilation", "algorithm"),
    [
        (1, 1, 1, "toeplitz"),
        (1, 7, 3, "toeplitz"),
        (5, 11, 1, "toeplitz"),
        (19, 11, 1, "toeplitz"),
        (7, 4, 2, "toeplitz"),
        (19, 9, 4, "toeplitz"),  # half of the kernel reaches before the first token
        (67, 1, 1, "direct"),
        (83, 3, 3, "direct"),
        (131, 2, 1, "direct"),
        (131, 2, 11, "direct"),
        (131, 37, 1, "fft"),
        (131, 17, 6, "fft"),
        (131, 137, 1, "fft"),
    ],
)
def test_every_algorithm_matches_reference(sharing, length, width, dilation, algorithm, called, no_numba):
    fast, naive, shape, names = SHARING[sharing]
    if algorithm == "fft" and sharing == "channel":  # the reference is slow per channel: one channel is enough here
        shape = (HEADS, 1)
    channels = shape[1] if sharing == "channel" else CHANNELS
    assert_matches_reference(
        lambda x, kernel: fast(x, kernel, dilation=dilation),
        lambda x, kernel: naive(x, kernel, dilation=dilation),
        normal(BATCH, HEADS, length, channels),
        normal(*shape, width, seed=1),
    )
    assert called == [names.get(algorithm, algorithm)]


@pytest.mark.parametrize(
    ("sharing", "length", "width", "dilation", "algorithm"),
    [
        ("head", 131, 32, 1, "filter_direct"),
        ("head", 131, 33, 1, "filter_fft"),
        ("head", 67, 3, 1, "toeplitz"),  # a batch of two: too small for the direct algorithm
        ("channel", 131, 32, 1, "filter_direct"),
        ("channel", 131, 33, 1, "filter_fft"),
        ("channel", 67, 51, 1, "filter_direct"),
        ("channel", 19, 9, 4, "filter_direct"),  # half of the kernel reaches before the first token
        ("channel", 5, 11, 1, "filter_direct"),
        ("channel", 1, 7, 3, "filter_direct"),
    ],
)
def test_numba_takes_longer_kernels(sharing, length, width, dilation, algorithm, called):
    fast, naive, shape, _ = SHARING[sharing]
    assert_matches_reference(
        lambda x, kernel: fast(x, kernel, dilation=dilation),
        lambda x, kernel: naive(x, kernel, dilation=dilation),
        normal(BATCH, HEADS, length, CHANNELS),
        normal(*shape, width, seed=1),
    )
    assert called == [algorithm]


def test_numba_takes_short_sequences_if_the_batch_is_large(called):
    work = HEAD_LIMITS.numba.work
    batch = -(-work // (HEADS * CHANNELS * 19**2))
    x, kernel = normal(batch, HEADS, 19, CHANNELS), normal(HEADS, 3, seed=1)
    close(filter_heads(x, kernel)[:2], filter_heads(x[:2], kernel))
    assert called == ["filter_direct", "toeplitz"]


@pytest.mark.parametrize(("length", "width", "dilation"), [(1, 1, 1), (5, 11, 1), (19, 4, 1), (19, 4, 3), (19, 9, 4), (67, 3, 1)])
def test_filter_heads_at_matches_reference(length, width, dilation):
    positions = torch.tensor([[0, length // 2, length - 1], [length // 3, length // 3, length - 1]])
    assert_matches_reference(
        lambda x, kernel: filter_heads_at(x, kernel, positions, dilation=dilation),
        lambda x, kernel: gather_positions(naive_filter_heads(x, kernel, dilation=dilation), positions),
        normal(BATCH, HEADS, length, CHANNELS),
        normal(HEADS, width, seed=1),
    )


def naive_filter_groups(x, kernel, dilation):
    """Reference implementation of `filter_groups`."""
    kernels = kernel.expand(-1, -1, CHANNELS, -1)
    return torch.stack([naive_filter_channels(*group, dilation=dilation) for group in zip(x, kernels, strict=True)])


@pytest.mark.parametrize(("groups", "channels"), [(1, 1), (2, CHANNELS), (3, 1)])
@pytest.mark.parametrize(
    ("backend", "length", "width", "dilation", "chunk_tokens"),
    [
        (numba_backend, 1, 1, 1, 512),
        (numba_backend, 2, 5, 1, 512),  # kernel longer than the sequence
        (numba_backend, 83, 3, 20, 512),  # reaches back 40 tokens
        (numba_backend, 83, 3, 20, 37),
        (numba_backend, 83, 4, 1, 1),
        (numba_backend, 19, 4, 2, 50),  # two sequences per chunk
        (torch_backend, 1, 1, 1, None),
        (torch_backend, 2, 5, 1, None),
        (torch_backend, 83, 3, 20, None),
    ],
)
def test_direct_backends_match_reference(backend, length, width, dilation, chunk_tokens, channels, groups, monkeypatch):
    monkeypatch.setattr(direct, "backend_for", lambda x: backend)
    monkeypatch.setattr(numba_backend, "CHUNK_TOKENS", chunk_tokens)
    assert_matches_reference(
        lambda x, kernel: torch.stack(filter_groups(x, kernel, dilation=dilation)),
        lambda x, kernel: naive_filter_groups(x, kernel, dilation),
        normal(groups, 3, HEADS, length, CHANNELS),
        normal(groups, HEADS, channels, width, seed=1),
    )


@pytest.mark.parametrize("backend", [numba_backend, torch_backend])
def test_each_ensemble_member_has_its_own_kernel(backend):
    x, kernel, *grad_y = normal(3, 2, 4, HEADS, 23, 5), normal(3, 2, HEADS, 5, 3), *normal(2, 3, 4, HEADS, 23, 5, seed=1)
    y, gradients = backend.filter_stacks(x, kernel, 2), backend.filter_gradients(x, kernel, grad_y, 2)
    for r in range(3):
        own = slice(r, r + 1)
        close(y[own], backend.filter_stacks(x[own], kernel[own], 2))
        expected = backend.filter_gradients(x[own], kernel[own], [gradient[own] for gradient in grad_y], 2)
        close(tuple(gradient[own] for gradient in gradients), expected)


LAYOUTS = {
    "projection": lambda x: x.permute(1, 3, 0, 2, 4).contiguous().permute(2, 0, 3, 1, 4),
    "slice of a projection": lambda x: torch.cat([x, x], 4)[..., : x.shape[4]],
    "channels first": lambda x: x.mT.contiguous().mT,
    "expanded": lambda x: x[:1, :1, :1, :1, :1].expand(x.shape),
    "empty": lambda x: x[:, :0],
}


# An output and its gradient have the same shape, so both are empty or none. Only Numba's loops depend on pairs of layouts.
PAIRS = [(a, b) for a in LAYOUTS for b in LAYOUTS if (a == "empty") == (b == "empty")]


@pytest.mark.parametrize(
    ("backend", "layout", "gradient"),
    [*((numba_backend, a, b) for a, b in PAIRS), *((torch_backend, layout, layout) for layout in LAYOUTS)],
)
def test_any_memory_layout(backend, layout, gradient, monkeypatch):
    monkeypatch.setattr(direct, "backend_for", lambda x: backend)
    x = LAYOUTS[layout](normal(2, 3, HEADS, 23, CHANNELS)).requires_grad_()
    kernel = normal(2, HEADS, 1, 3, seed=1).requires_grad_()
    cotangent = LAYOUTS[gradient](normal(2, 3, HEADS, 23, CHANNELS, seed=2))
    actual, expected = torch.stack(filter_groups(x, kernel)), naive_filter_groups(x, kernel, 1)
    close(actual, expected)
    close(*(torch.autograd.grad(y, (x, kernel), cotangent) for y in (actual, expected)))


@pytest.mark.parametrize("backend", [numba_backend, torch_backend])
@pytest.mark.parametrize("x_dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel_dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dtypes_are_promoted_as_in_pytorch(x_dtype, kernel_dtype, backend, monkeypatch):
    monkeypatch.setattr(direct, "backend_for", lambda x: backend)
    x = normal(1, 2, HEADS, 23, 4).to(x_dtype).requires_grad_()
    kernel = normal(1, HEADS, 1, 3).to(kernel_dtype).requires_grad_()
    (y,) = filter_groups(x, kernel)
    assert y.dtype == torch.promote_types(x_dtype, kernel_dtype)
    exact = [t.detach().double().requires_grad_() for t in (x, kernel)]
    gradients = torch.autograd.grad(y.sum(), (x, kernel))
    assert [gradient.dtype for gradient in gradients] == [x_dtype, kernel_dtype]
    tolerance = 0.02 if torch.bfloat16 in (x_dtype, kernel_dtype) else 1e-5
    (exact_y,) = filter_groups(*exact)
    for rough, true in zip((y, *gradients), (exact_y, *torch.autograd.grad(exact_y.sum(), exact)), strict=True):
        assert (rough - true).norm() < tolerance * true.norm()


def numba_digest(threads=1):
    """Return a digest of the outputs and gradients of a convolution that has many chunks."""
    torch.set_num_threads(threads)
    x, kernel = (
        normal(3, 20, HEADS, 150, CHANNELS).float().requires_grad_(),
        normal(3, HEADS, 1, 4, seed=1).float().requires_grad_(),
    )
    y = torch.stack(filter_groups(x, kernel, dilation=3))
    tensors = (y, *torch.autograd.grad(y.square().sum(), (x, kernel)))
    return hashlib.sha256(b"".join(t.detach().numpy().tobytes() for t in tensors)).hexdigest()


def test_numba_gives_the_same_bits_with_every_number_of_threads():
    try:
        assert numba_digest(threads=3) == numba_digest(threads=7) == numba_digest()
    finally:
        torch.set_num_threads(1)


WITHOUT_CACHE = """
from numba.core import caching
caching.CacheImpl._locator_classes = []
from tests.cat.ops.test_conv import numba_digest
print(numba_digest())
"""


def test_numba_gives_the_same_bits_on_a_generic_cpu_without_a_writable_cache():
    generic = {**os.environ, "NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": "", "NUMBA_CACHE_DIR": ""}
    done = subprocess.run([sys.executable, "-c", WITHOUT_CACHE], env=generic, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == numba_digest()


FORK = """
import os, torch, warnings
from cat.ops.conv import numba_backend
from tests.helpers.reference import normal
x, kernel = normal(1, 1, 2, 1, 700, 3), normal(1, 1, 1, 1, 4)
torch.set_num_threads(2)
expected = numba_backend.filter_stacks(x, kernel, 1)
warnings.simplefilter("ignore")  # Python warns because a process with threads forks
child = os.fork()
if child == 0:
    os._exit(not torch.equal(numba_backend.filter_stacks(x, kernel, 1), expected))
assert os.waitpid(child, 0)[1] == 0
"""


def test_forked_process_starts_its_own_threads():
    subprocess.run([sys.executable, "-c", FORK], check=True, timeout=120)


COMPILED = """
import torch
from cat.ops.conv.causal import filter_heads
x, kernel = torch.randn(2, 3, 200, 5), torch.randn(3, 4)
compiled = torch.compile(filter_heads, backend="eager", fullgraph=True)
torch.testing.assert_close(compiled(x, kernel), filter_heads(x, kernel))
"""


def test_torch_compile_does_not_meet_numba():
    """Run in a process without type checks, which torch.compile would compile too."""
    subprocess.run([sys.executable, "-W", "ignore", "-c", COMPILED], check=True)


@pytest.mark.parametrize("width", [1, 3, 7])
def test_toeplitz_has_the_kernel_on_its_diagonals(width):
    length, kernel = 7, normal(HEADS, width)
    matrices = toeplitz(kernel, length)
    for i in range(length):
        for j in range(length):
            expected = kernel[:, i - j] if 0 <= i - j < width else torch.zeros(HEADS)
            assert matrices[:, i, j].tolist() == expected.tolist()


def test_heads_channels_and_sequences_are_independent():
    x, kernel = normal(BATCH, HEADS, 11, CHANNELS), normal(HEADS, 3, seed=1)
    expected = filter_heads(x[1:, 2:, :, 4:], kernel[2:])
    close(filter_heads(x, kernel)[1:, 2:, :, 4:], expected)


def test_equal_kernels_per_channel_equal_one_kernel_per_head():
    x, kernel = normal(BATCH, HEADS, 11, CHANNELS), normal(HEADS, 3, seed=1)
    close(filter_channels(x, kernel[:, None].expand(-1, CHANNELS, -1)), filter_heads(x, kernel))


def test_mix_heads_reads_the_input_head_of_its_kernel():
    x, kernel = normal(BATCH, HEADS, 11, CHANNELS), torch.zeros(HEADS, HEADS, 2).double()
    kernel[0, 2, 1] = 1.0  # output head 0 is input head 2, delayed by one token
    y = mix_heads(x, kernel)
    close(y[:, 0, 1:], x[:, 2, :-1])
    assert not y[:, 1:].any()
    assert not y[:, 0, 0].any()


@pytest.mark.parametrize(("length", "width"), [(83, 3), (19, 7), (131, 37)])
def test_mix_heads_with_more_input_than_output_heads(length, width):
    kernel = normal(HEADS, 2 * HEADS, width, seed=1)
    assert_matches_reference(mix_heads, naive_mix_heads, normal(BATCH, 2 * HEADS, length, CHANNELS), kernel)


def test_mix_heads_has_gradients_under_autocast():
    x, kernel = (t.float().requires_grad_() for t in (normal(BATCH, HEADS, 83, CHANNELS), normal(HEADS, HEADS, 4, seed=1)))
    exact = torch.autograd.grad(mix_heads(x, kernel).square().sum(), (x, kernel))
    with torch.autocast("cpu", torch.bfloat16):
        y = mix_heads(x, kernel)
    for rough, gradient in zip(torch.autograd.grad(y.float().square().sum(), (x, kernel)), exact, strict=True):
        assert (rough - gradient).norm() < 0.02 * gradient.norm()


@pytest.mark.parametrize("sharing", SHARING)
def test_fft_output_is_contiguous(sharing):
    operation, _, shape, _ = SHARING[sharing]
    assert operation(normal(BATCH, HEADS, 131, CHANNELS), normal(*shape, 37, seed=1)).is_contiguous()


def test_dilation_delays_the_last_kernel_value():
    x, kernel = normal(BATCH, HEADS, 11, CHANNELS), torch.tensor([0.0, 0.0, 1.0]).double().expand(HEADS, -1)
    y = filter_heads(x, kernel, dilation=4)
    close(y[:, :, 8:], x[:, :, :-8])
    assert not y[:, :, :8].any()


def test_fft_sizes_have_small_factors():
    assert [_padded_size(n, 1) for n in (1, 2, 3, 7, 71, 103, 511, 8191)] == [1, 2, 3, 8, 72, 120, 512, 8192]
