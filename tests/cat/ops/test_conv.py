"""Filters: every algorithm against the definition, for every way to share taps."""

import hashlib
import os
import subprocess
import sys

import pytest
import torch

from cat.ops.conv import causal, direct, numba_backend, torch_backend
from cat.ops.conv.causal import HEAD_LIMITS, filter_channels, filter_groups, filter_heads, filter_heads_at, mix_heads
from cat.ops.conv.fft import _fast_size
from cat.ops.conv.reference import naive_filter_channels, naive_filter_heads, naive_mix_heads
from cat.ops.conv.toeplitz import toeplitz
from cat.ops.position import gather_positions
from tests.helpers.reference import assert_twins, close, normal

BATCH, HEADS, CHANNELS = 2, 3, 5
KINDS = {
    "head": (filter_heads, naive_filter_heads, (HEADS,), {"shifts": "filter_direct", "fft": "filter_fft"}),
    "channel": (filter_channels, naive_filter_channels, (HEADS, CHANNELS), {"shifts": "filter_direct", "fft": "filter_fft"}),
    "mixing": (mix_heads, naive_mix_heads, (HEADS, HEADS), {"shifts": "mix_direct", "fft": "mix_fft"}),
}


@pytest.fixture
def called(monkeypatch):
    """The algorithms that a filter takes, as it takes them."""
    names = []
    toeplitz = dict.fromkeys(("filter_heads_toeplitz", "filter_channels_toeplitz", "mix_toeplitz", "toeplitz"), "toeplitz")
    for name, label in {**toeplitz, **{n: n for n in ("filter_direct", "filter_fft", "mix_direct", "mix_fft")}}.items():
        original = getattr(causal, name)
        monkeypatch.setattr(causal, name, lambda *args, n=label, f=original, **options: names.append(n) or f(*args, **options))
    return names


@pytest.fixture
def no_loops(monkeypatch):
    """As on a device for which nothing is compiled."""
    for module in (causal, direct):
        monkeypatch.setattr(module, "uses_numba", lambda x: False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("length", "width", "dilation", "algorithm"),
    [
        (1, 1, 1, "toeplitz"),
        (1, 7, 3, "toeplitz"),
        (5, 11, 1, "toeplitz"),
        (19, 11, 1, "toeplitz"),
        (7, 4, 2, "toeplitz"),
        (19, 9, 4, "toeplitz"),  # half of the taps reach past the first token
        (67, 1, 1, "shifts"),
        (83, 3, 3, "shifts"),
        (131, 2, 1, "shifts"),
        (131, 2, 11, "shifts"),
        (131, 37, 1, "fft"),
        (131, 17, 6, "fft"),
        (131, 137, 1, "fft"),
    ],
)
def test_every_algorithm_is_the_definition(kind, length, width, dilation, algorithm, called, no_loops):
    fast, naive, rows, names = KINDS[kind]
    if algorithm == "fft" and kind == "channel":  # the naive twin goes channel by channel: one of them is enough here
        rows = (HEADS, 1)
    channels = rows[1] if kind == "channel" else CHANNELS
    assert_twins(
        lambda x, taps: fast(x, taps, dilation=dilation),
        lambda x, taps: naive(x, taps, dilation=dilation),
        normal(BATCH, HEADS, length, channels),
        normal(*rows, width, seed=1),
    )
    assert called == [names.get(algorithm, algorithm)]


@pytest.mark.parametrize(
    ("kind", "length", "width", "dilation", "algorithm"),
    [
        ("head", 131, 32, 1, "filter_direct"),
        ("head", 131, 33, 1, "filter_fft"),
        ("head", 67, 3, 1, "toeplitz"),  # of two sequences
        ("channel", 131, 32, 1, "filter_direct"),
        ("channel", 131, 33, 1, "filter_fft"),
        ("channel", 67, 51, 1, "filter_direct"),
        ("channel", 19, 9, 4, "filter_direct"),  # half of the taps reach past the first token
        ("channel", 5, 11, 1, "filter_direct"),
        ("channel", 1, 7, 3, "filter_direct"),
    ],
)
def test_a_cpu_has_loops_for_more_taps(kind, length, width, dilation, algorithm, called):
    fast, naive, rows, _ = KINDS[kind]
    assert_twins(
        lambda x, taps: fast(x, taps, dilation=dilation),
        lambda x, taps: naive(x, taps, dilation=dilation),
        normal(BATCH, HEADS, length, CHANNELS),
        normal(*rows, width, seed=1),
    )
    assert called == [algorithm]


def test_a_filter_a_head_is_by_loops_where_sequences_are_many(called):
    work = HEAD_LIMITS.numba.work
    batch = -(-work // (HEADS * CHANNELS * 19**2))
    x, taps = normal(batch, HEADS, 19, CHANNELS), normal(HEADS, 3, seed=1)
    close(filter_heads(x, taps)[:2], filter_heads(x[:2], taps))
    assert called == ["filter_direct", "toeplitz"]


@pytest.mark.parametrize(("length", "width", "dilation"), [(1, 1, 1), (5, 11, 1), (19, 4, 1), (19, 4, 3), (19, 9, 4), (67, 3, 1)])
def test_a_filter_at_some_positions_is_the_definition_there(length, width, dilation):
    at = torch.tensor([[0, length // 2, length - 1], [length // 3, length // 3, length - 1]])
    assert_twins(
        lambda x, taps: filter_heads_at(x, taps, at, dilation=dilation),
        lambda x, taps: gather_positions(naive_filter_heads(x, taps, dilation=dilation), at),
        normal(BATCH, HEADS, length, CHANNELS),
        normal(HEADS, width, seed=1),
    )


def naive_filter_groups(x, taps, dilation):
    """Each group's filter by its definition."""
    rows = taps.expand(-1, -1, CHANNELS, -1)
    return torch.stack([naive_filter_channels(*group, dilation=dilation) for group in zip(x, rows, strict=True)])


@pytest.mark.parametrize("module", [numba_backend, torch_backend])
@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("channels", [1, CHANNELS])
@pytest.mark.parametrize(
    ("length", "width", "dilation", "tokens"),
    [
        (1, 1, 1, 512),
        (2, 5, 1, 512),  # more taps than tokens
        (83, 3, 20, 512),  # the last tap reaches back 40 tokens
        (83, 3, 20, 37),
        (83, 4, 1, 1),
        (19, 4, 2, 50),  # two sequences are a part
    ],
)
def test_what_is_filtered_part_by_part_is_the_definition(length, width, dilation, tokens, channels, groups, module, monkeypatch):
    monkeypatch.setattr(direct, "backend_for", lambda x: module)
    monkeypatch.setattr(numba_backend, "TOKENS", tokens)
    assert_twins(
        lambda x, taps: torch.stack(filter_groups(x, taps, dilation=dilation)),
        lambda x, taps: naive_filter_groups(x, taps, dilation),
        normal(groups, 3, HEADS, length, CHANNELS),
        normal(groups, HEADS, channels, width, seed=1),
    )


@pytest.mark.parametrize("module", [numba_backend, torch_backend])
def test_each_replica_is_filtered_with_its_own_taps(module):
    x, taps, *of_y = normal(3, 2, 4, HEADS, 23, 5), normal(3, 2, HEADS, 5, 3), *normal(2, 3, 4, HEADS, 23, 5, seed=1)
    y, gradients = module.filter_stacks(x, taps, 2), module.filter_gradients(x, taps, of_y, 2)
    for r in range(3):
        own = slice(r, r + 1)
        close(y[own], module.filter_stacks(x[own], taps[own], 2))
        alone = module.filter_gradients(x[own], taps[own], [gradient[own] for gradient in of_y], 2)
        close(tuple(gradient[own] for gradient in gradients), alone)


LAYOUTS = {
    "as a projection lies": lambda x: x.permute(1, 3, 0, 2, 4).contiguous().permute(2, 0, 3, 1, 4),
    "a part of a projection": lambda x: torch.cat([x, x], 4)[..., : x.shape[4]],
    "channel by channel": lambda x: x.mT.contiguous().mT,
    "one number": lambda x: x[:1, :1, :1, :1, :1].expand(x.shape),
    "nothing": lambda x: x[:, :0],
}


# A gradient is as large as what it is of.
@pytest.mark.parametrize(
    ("layout", "gradient"), [(a, b) for a in LAYOUTS for b in LAYOUTS if (a == "nothing") == (b == "nothing")]
)
@pytest.mark.parametrize("module", [numba_backend, torch_backend])
def test_any_layout_is_filtered(module, layout, gradient, monkeypatch):
    monkeypatch.setattr(direct, "backend_for", lambda x: module)
    x = LAYOUTS[layout](normal(2, 3, HEADS, 23, CHANNELS)).requires_grad_()
    taps = normal(2, HEADS, 1, 3, seed=1).requires_grad_()
    cotangent = LAYOUTS[gradient](normal(2, 3, HEADS, 23, CHANNELS, seed=2))
    ours, theirs = torch.stack(filter_groups(x, taps)), naive_filter_groups(x, taps, 1)
    close(ours, theirs)
    close(*(torch.autograd.grad(y, (x, taps), cotangent) for y in (ours, theirs)))


@pytest.mark.parametrize("module", [numba_backend, torch_backend])
@pytest.mark.parametrize("of_x", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("of_taps", [torch.float64, torch.float32, torch.bfloat16])
def test_numbers_are_of_the_kind_that_pytorch_makes_of_both(of_x, of_taps, module, monkeypatch):
    monkeypatch.setattr(direct, "backend_for", lambda x: module)
    x, taps = (t.to(kind).requires_grad_() for t, kind in ((normal(1, 2, HEADS, 23, 4), of_x), (normal(1, HEADS, 1, 3), of_taps)))
    (y,) = filter_groups(x, taps)
    assert y.dtype == torch.promote_types(of_x, of_taps)
    exact = [t.detach().double().requires_grad_() for t in (x, taps)]
    gradients = torch.autograd.grad(y.sum(), (x, taps))
    assert [gradient.dtype for gradient in gradients] == [of_x, of_taps]
    error = 0.02 if torch.bfloat16 in (of_x, of_taps) else 1e-5
    (theirs,) = filter_groups(*exact)
    for rough, true in zip((y, *gradients), (theirs, *torch.autograd.grad(theirs.sum(), exact)), strict=True):
        assert (rough - true).norm() < error * true.norm()


def bits_of_loops(threads=1):
    """A digest of filtered groups and of their gradients, many parts of them."""
    torch.set_num_threads(threads)
    x, taps = (
        normal(3, 20, HEADS, 150, CHANNELS).float().requires_grad_(),
        normal(3, HEADS, 1, 4, seed=1).float().requires_grad_(),
    )
    y = torch.stack(filter_groups(x, taps, dilation=3))
    tensors = (y, *torch.autograd.grad(y.square().sum(), (x, taps)))
    return hashlib.sha256(b"".join(t.detach().numpy().tobytes() for t in tensors)).hexdigest()


def test_loops_give_the_same_bits_on_every_number_of_threads_and_kind_of_cpu():
    try:
        expected = bits_of_loops()
        assert bits_of_loops(threads=3) == bits_of_loops(threads=7) == expected
    finally:
        torch.set_num_threads(1)
    script = "from tests.cat.ops.test_conv import bits_of_loops; print(bits_of_loops())"
    simple = {**os.environ, "NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": "", "NUMBA_CACHE_DIR": ""}
    done = subprocess.run([sys.executable, "-c", script], env=simple, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == expected


FORK = """
import os, torch, warnings
from cat.ops.conv import numba_backend
from tests.helpers.reference import normal
x, taps = normal(1, 1, 2, 1, 700, 3), normal(1, 1, 1, 1, 4)
torch.set_num_threads(2)
expected = numba_backend.filter_stacks(x, taps, 1)
warnings.simplefilter("ignore")  # a process with threads forks, which is what this is about
child = os.fork()
if child == 0:
    os._exit(not torch.equal(numba_backend.filter_stacks(x, taps, 1), expected))
assert os.waitpid(child, 0)[1] == 0
"""


def test_a_forked_process_has_threads_of_its_own():
    subprocess.run([sys.executable, "-c", FORK], check=True, timeout=120)


NO_PLACE = """
from numba.core import caching
caching.CacheImpl._locator_classes = []
from tests.cat.ops.test_conv import bits_of_loops
print(bits_of_loops())
"""


def test_loops_that_can_be_kept_nowhere_are_compiled_in_every_process():
    done = subprocess.run([sys.executable, "-c", NO_PLACE], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == bits_of_loops()


WHOLE = """
import torch
from cat.ops.conv.causal import filter_heads
x, taps = torch.randn(2, 3, 200, 5), torch.randn(3, 4)
compiled = torch.compile(filter_heads, backend="eager", fullgraph=True)
torch.testing.assert_close(compiled(x, taps), filter_heads(x, taps))
"""


def test_the_compiler_sees_no_loops_that_it_cannot_read():
    """Where nothing checks types: it would compile the checks."""
    subprocess.run([sys.executable, "-W", "ignore", "-c", WHOLE], check=True)


@pytest.mark.parametrize("width", [1, 3, 7])
def test_toeplitz_holds_the_taps_on_its_diagonals(width):
    length, taps = 7, normal(HEADS, width)
    matrices = toeplitz(taps, length)
    for i in range(length):
        for j in range(length):
            expected = taps[:, i - j] if 0 <= i - j < width else torch.zeros(HEADS)
            assert matrices[:, i, j].tolist() == expected.tolist()


def test_filters_do_not_mix_heads_channels_or_rows():
    x, taps = normal(BATCH, HEADS, 11, CHANNELS), normal(HEADS, 3, seed=1)
    alone = filter_heads(x[1:, 2:, :, 4:], taps[2:])
    close(filter_heads(x, taps)[1:, 2:, :, 4:], alone)


def test_a_filter_a_channel_with_equal_taps_is_a_filter_a_head():
    x, taps = normal(BATCH, HEADS, 11, CHANNELS), normal(HEADS, 3, seed=1)
    close(filter_channels(x, taps[:, None].expand(-1, CHANNELS, -1)), filter_heads(x, taps))


def test_mixing_reads_the_head_that_its_taps_name():
    x, taps = normal(BATCH, HEADS, 11, CHANNELS), torch.zeros(HEADS, HEADS, 2).double()
    taps[0, 2, 1] = 1.0  # head 0 is head 2, one token late
    y = mix_heads(x, taps)
    close(y[:, 0, 1:], x[:, 2, :-1])
    assert not y[:, 1:].any()
    assert not y[:, 0, 0].any()


@pytest.mark.parametrize(("length", "width"), [(83, 3), (19, 7), (131, 37)])
def test_other_heads_can_be_mixed_than_come_out(length, width):
    taps = normal(HEADS, 2 * HEADS, width, seed=1)
    assert_twins(mix_heads, naive_mix_heads, normal(BATCH, 2 * HEADS, length, CHANNELS), taps)


def test_mixing_has_gradients_under_autocast():
    x, taps = (t.float().requires_grad_() for t in (normal(BATCH, HEADS, 83, CHANNELS), normal(HEADS, HEADS, 4, seed=1)))
    exact = torch.autograd.grad(mix_heads(x, taps).square().sum(), (x, taps))
    with torch.autocast("cpu", torch.bfloat16):
        y = mix_heads(x, taps)
    for rough, gradient in zip(torch.autograd.grad(y.float().square().sum(), (x, taps)), exact, strict=True):
        assert (rough - gradient).norm() < 0.02 * gradient.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_filtered_by_fft_has_its_channels_side_by_side(kind):
    filtered, _, rows, _ = KINDS[kind]
    assert filtered(normal(BATCH, HEADS, 131, CHANNELS), normal(*rows, 37, seed=1)).is_contiguous()


def test_taps_are_dilation_tokens_apart():
    x, taps = normal(BATCH, HEADS, 11, CHANNELS), torch.tensor([0.0, 0.0, 1.0]).double().expand(HEADS, -1)
    y = filter_heads(x, taps, dilation=4)
    close(y[:, :, 8:], x[:, :, :-8])
    assert not y[:, :, :8].any()


def test_fourier_transforms_have_a_fast_size():
    assert [_fast_size(n) for n in (1, 2, 3, 7, 71, 103, 511, 8191)] == [1, 2, 3, 8, 72, 120, 512, 8192]
