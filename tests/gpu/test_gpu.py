"""Tests that need a GPU; skipped without one."""

import copy
import gc
import subprocess
import sys

import pytest
import torch

import cat.training.cuda_graph
from cat import ConvolutionAugmentedAttention
from cat.evaluation.scores import Split, score
from cat.ops.conv.causal import filter_channels, filter_heads
from cat.ops.conv.reference import naive_filter_channels, naive_filter_heads
from cat.training.cuda_graph import GraphedFunction
from cat.training.ensemble import Ensemble, can_ensemble, fit_ensemble
from cat.training.fit import backward, build_model, fit, mean_loss
from pipeline.storage import runs
from tests.cat.training.test_ensemble import GRID, LENGTH, TRAINING, VOCABULARY, successor
from tests.helpers.mixers import EXAMPLES, configure

REPRODUCIBLE = [name for name in EXAMPLES if not configure(**EXAMPLES[name]).mixers[0].selects_tokens]
"""Mixers that train to the same bits without `deterministic`. Landmark attention sums gradients of its blocks in any order."""
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def on_gpu(split):
    return Split(*(tensor.cuda() for tensor in split))


def models(name, seeds=(0, 1)):
    config = configure(**EXAMPLES[name])
    return [build_model(config, vocabulary=VOCABULARY, length=LENGTH, seed=seed).cuda() for seed in seeds]


def train(name, *, steps=9, precision="float32", **options):
    """Train the grid as an ensemble on the GPU."""
    seeds, rates = zip(*GRID, strict=True)
    return fit_ensemble(
        models(name, seeds),
        on_gpu(successor(18)),
        on_gpu(successor(7, seed=1)),
        config=TRAINING.model_copy(update={"steps": steps}),
        learning_rates=rates,
        seeds=seeds,
        stop_early=False,
        precision=precision,
        **options,
    )


def same_bits(runs, others):
    for ours, theirs in zip(runs, others, strict=True):
        assert ours.history == theirs.history
        for name, weight in ours.model.state_dict().items():
            assert torch.equal(weight, theirs.model.state_dict()[name]), name


@pytest.mark.parametrize("stride", [(1 << 30) - 8, 1 << 30])
def test_the_triton_kernel_handles_tokens_far_apart_in_memory(stride):
    """The offset of the last of three tokens does not fit in 32 bits."""
    strides = (3 * stride, 3 * stride, stride, 1)
    strided = torch.zeros(2 * stride + 4, dtype=torch.float16, device="cuda").as_strided((1, 1, 3, 4), strides)
    x = torch.randn(1, 1, 3, 4, generator=torch.Generator().manual_seed(0)).half()
    kernel = torch.tensor([[0.5, 2.0]], dtype=torch.float16)
    strided.copy_(x)
    leaves = [(t.requires_grad_(), u.cuda().requires_grad_()) for t, u in ((strided, kernel), (x.cuda(), kernel))]
    far, near = (filter_heads(*pair) for pair in leaves)
    assert torch.equal(far, near)
    for pair in zip(*(torch.autograd.grad(y.sum(), pair) for y, pair in zip((far, near), leaves, strict=True)), strict=True):
        assert torch.equal(*pair)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(9, 4, 1, 1), (70, 5, 4, 3), (129, 16, 4, 1), (97, 66, 6, 2)])
@pytest.mark.parametrize("kind", ["head", "channel"])
def test_the_triton_kernel_equals_the_reference(kind, sizes, dtype):
    length, width, kernel_size, dilation = sizes
    ours, naive = {"head": (filter_heads, naive_filter_heads), "channel": (filter_channels, naive_filter_channels)}[kind]
    generator = torch.Generator().manual_seed(0)
    projected = torch.randn(2, length, 3, 3, width, generator=generator, dtype=torch.float64)
    kernel_shape = (3, kernel_size) if kind == "head" else (3, width, kernel_size)
    kernel = torch.randn(*kernel_shape, generator=generator, dtype=torch.float64)
    weights = torch.randn(2, 3, length, width, generator=generator, dtype=torch.float64)

    def passes(operation, device, dtype):
        leaves = [t.to(device, dtype).requires_grad_() for t in (projected, kernel)]
        y = operation(leaves[0][:, :, 1].transpose(1, 2), leaves[1], dilation=dilation)
        return [
            y.detach().cpu().double(),
            *(g.cpu().double() for g in torch.autograd.grad(y, leaves, weights.to(device, y.dtype))),
        ]

    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    for a, b in zip(passes(ours, "cuda", dtype), passes(naive, "cpu", torch.float64), strict=True):
        assert (a - b).norm() <= tolerance * b.norm()


@pytest.mark.parametrize("mapped", [(0, 0), (1, None), (None, 2)])
def test_vmap_of_the_triton_kernel_over_sequences_and_kernels(mapped):
    shapes = [(2, 3, 129, 8), (3, 4)]
    whole = [torch.randn(*s, dtype=torch.float64, device="cuda") for s in shapes]
    stacked = [t if axis is None else torch.stack([t, -2 * t, t + 1], axis) for t, axis in zip(whole, mapped, strict=True)]
    leaves = [t.requires_grad_() for t in stacked]
    each = zip(*([x] * 3 if axis is None else x.unbind(axis) for x, axis in zip(leaves, mapped, strict=True)), strict=True)
    ours, theirs = torch.vmap(filter_heads, mapped)(*leaves), torch.stack([naive_filter_heads(*row) for row in each])
    weights = torch.randn_like(theirs)
    for a, b in zip(*((y, *torch.autograd.grad(y, leaves, weights)) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name != "landmark"])  # its blocks can tie
def test_losses_and_gradients_equal_those_of_the_cpu(name):
    (model,) = models(name, (3,))
    model.double()  # in float32, rounding can decide which block is chosen
    cpu_model, batch = copy.deepcopy(model).cpu(), successor(5).rows(slice(None))
    loss, exact = mean_loss(model, on_gpu(batch)), mean_loss(cpu_model, batch)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)
    loss.backward()
    exact.backward()
    ours, theirs = (
        torch.cat([p.grad.flatten().cpu().double() for p in m.parameters() if p.grad is not None]) for m in (model, cpu_model)
    )
    assert (ours - theirs).norm() <= 1e-3 * theirs.norm()


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_replayed_step_equals_the_step_to_the_bit(name, monkeypatch):
    assert can_ensemble(configure(**EXAMPLES[name]))
    recorded, record = [], GraphedFunction._record

    def record_and_note(graphed, inputs):
        record(graphed, inputs)
        recorded.append(graphed.graph is not None)

    monkeypatch.setattr(GraphedFunction, "_record", record_and_note)
    replayed = train(name)
    assert recorded == [True]
    if name in REPRODUCIBLE:
        monkeypatch.setattr(cat.training.cuda_graph, "WARMUP_CALLS", 10**9)
        same_bits(replayed, train(name))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int32, torch.uint32])
def test_tokens_of_every_type_can_be_indexed(dtype):
    tokens = torch.tensor([3, 255, 7]).to(dtype)
    assert runs._indexable(tokens, torch.device("cuda"))[torch.tensor([1, 0], device="cuda")].tolist() == [255, 3]


def test_members_train_as_alone():
    seeds, rates = zip(*GRID, strict=True)
    options = {"config": TRAINING.model_copy(update={"steps": 9}), "stop_early": False}
    splits = on_gpu(successor(18)), on_gpu(successor(7, seed=1))
    alone = [
        fit(model, *splits, learning_rate=rate, seed=seed, **options)
        for model, seed, rate in zip(models("attention_all", seeds), seeds, rates, strict=True)
    ]
    for ours, theirs in zip(train("attention_all"), alone, strict=True):
        torch.testing.assert_close(ours.model.state_dict(), theirs.model.state_dict(), rtol=1e-3, atol=1e-3)


def test_when_a_member_leaves_the_step_is_recorded_again(monkeypatch):
    recorded, record = [], GraphedFunction._record
    monkeypatch.setattr(
        GraphedFunction, "_record", lambda graphed, inputs: (record(graphed, inputs), recorded.append(inputs[1].shape[0]))[0]
    )
    seeds, rates = (0, 1, 2), (0.01, 1e30, 0.003)
    runs = fit_ensemble(
        models("performer_state", seeds),
        on_gpu(successor(18)),
        on_gpu(successor(7, seed=1)),
        config=TRAINING.model_copy(update={"eval_every": 5, "steps": 15}),
        learning_rates=rates,
        seeds=seeds,
        stop_early=False,
    )
    assert [run.stop for run in runs] == ["steps", "diverged", "steps"]
    assert recorded == [3, 2]


def test_a_resumed_run_has_the_same_bits():
    saved = []
    whole = train("attention_all", checkpoint=lambda states, ended: saved.append(states()) if len(saved) < 5 else None)
    same_bits(whole, train("attention_all", resume=list(saved[4].values())))


UNRECORDABLE = """
import torch
from cat.training.cuda_graph import WARMUP_CALLS, GraphedFunction
graphed = GraphedFunction(lambda x: x * x.sum().item())
x = torch.ones(3, device="cuda")
assert [graphed(x + i).tolist() for i in range(WARMUP_CALLS + 2)] == [[3 * (1 + i) ** 2] * 3 for i in range(WARMUP_CALLS + 2)]
assert not graphed.recordable
assert torch.ones(1, device="cuda").item() == 1
"""


def test_a_function_that_cannot_be_recorded_is_called():
    """In a process of its own: for PyTorch's allocator a failed recording never ends, which would disturb tests about memory."""
    subprocess.run([sys.executable, "-W", "ignore", "-c", UNRECORDABLE], check=True)


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name != "landmark"])
def test_cached_steps_equal_the_forward_pass_of_the_cpu(name):
    (model,) = models(name, (3,))
    model.double()
    cpu_model, tokens = copy.deepcopy(model).cpu(), successor(5).inputs.long()
    caches = []
    with torch.no_grad():
        for part in tokens.cuda().split([3, 1, tokens.shape[1] - 4], dim=1):
            logits, caches = model.step(part, caches)
        torch.testing.assert_close(logits.cpu(), cpu_model(tokens)[:, -1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"conv_q": 4, "conv_k": 3, "conv_v": 2, "kv_heads": 2, "bias": True},
        {"conv_k": 200, "position": "rotary", "rope_base": 1e5, "rope_scale": 2.0},
        {"conv_k": 4, "position": "alibi"},
        {"conv_k": 4, "window": 9},
    ],
    ids=str,
)
@pytest.mark.parametrize("documents", ["whole", "padded", "packed"])
def test_the_layer_equals_that_of_the_cpu(options, documents):
    torch.manual_seed(0)
    layer, x = ConvolutionAugmentedAttention(48, 4, dtype=torch.float64, **options), torch.randn(2, 70, 48, dtype=torch.float64)
    masks = {
        "whole": {},
        "padded": {"attention_mask": torch.arange(70) >= torch.tensor([[0], [30]])},
        "packed": {"segment_ids": torch.arange(70).expand(2, -1) // torch.tensor([[20], [33]])},
    }[documents]
    results = []
    for device in ("cpu", "cuda"):
        layer, inputs = layer.to(device), x.to(device).requires_grad_()
        y = layer(inputs, **{name: mask.to(device) for name, mask in masks.items()})
        results.append([t.cpu() for t in (y, *torch.autograd.grad(y.square().sum(), [inputs, *layer.parameters()]))])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("name", REPRODUCIBLE)
def test_the_same_seed_trains_to_the_same_bits(name):
    same_bits(train(name), train(name))


@pytest.mark.parametrize("name", ["attention_all", "mamba"])
def test_bfloat16_trains_float32_weights(name):
    rough, exact = train(name, precision="bfloat16"), train(name)
    for ours, theirs in zip(rough, exact, strict=True):
        assert {weight.dtype for weight in ours.model.state_dict().values()} == {torch.float32}
        assert ours.history[-1].valid_loss == pytest.approx(theirs.history[-1].valid_loss, rel=0.05)


def limit_memory(more):
    """Limit the GPU memory to what is reserved now plus `more` bytes."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + more) / total)


@pytest.fixture
def little_memory():
    """A function that limits the memory until the end of the test."""
    torch.cuda.empty_cache()
    yield limit_memory
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


def test_a_batch_that_does_not_fit_in_memory_is_split(little_memory):
    (model,) = models("attention_all", (0,))
    batch = on_gpu(successor(4096)).rows(slice(None))
    whole, size = backward(model, batch)
    gradients = [p.grad.clone() for p in model.parameters()]
    assert size is None
    model.zero_grad()
    little_memory(200 << 20)
    split, size = backward(model, batch)
    assert size is not None
    assert split.item() == pytest.approx(whole.item(), rel=1e-5)
    for ours, theirs in zip((p.grad for p in model.parameters()), gradients, strict=True):
        assert (ours - theirs).norm() <= 1e-3 * theirs.norm()


def train_with_half_the_memory():
    """Train an ensemble that does not fit in memory. To be run in a process with a fresh allocator."""
    seeds = tuple(range(8))
    batch = on_gpu(successor(1024)).rows(slice(None))
    batches = Split(*(tensor.expand(len(seeds), *tensor.shape).contiguous() for tensor in batch))

    def steps():
        members = models("attention_all", seeds)
        ensemble = Ensemble(members, [0.01] * len(seeds), config=TRAINING, precision="float32")
        return [ensemble.step(batches, 1.0) for _ in range(4)], ensemble.members_at_once

    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    expected, members_at_once = steps()
    assert members_at_once == len(seeds)
    gc.collect()
    limit_memory((torch.cuda.max_memory_allocated() - before) // 2)
    limited, members_at_once = steps()
    assert members_at_once < len(seeds), torch.cuda.memory_summary(abbreviated=True)
    torch.testing.assert_close(limited, expected, rtol=1e-4, atol=1e-4)


def test_members_that_do_not_fit_in_memory_are_computed_in_turn():
    code = "from tests.gpu.test_gpu import train_with_half_the_memory as train; train()"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def test_scoring_that_does_not_fit_in_memory_uses_smaller_chunks(little_memory):
    (model,) = models("attention_all", (0,))
    split = on_gpu(successor(4096))
    expected = score(model, split)
    little_memory(30 << 20)
    assert score(model, split) == pytest.approx(expected, rel=1e-6)


COMPILED = """
import torch
from tests.gpu.test_gpu import mean_loss, models, on_gpu, successor
batch = on_gpu(successor(8)).rows(slice(None))
ours, theirs = models("attention_all", (0, 0))
torch.compile(mean_loss)(ours, batch).backward()
mean_loss(theirs, batch).backward()
for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5)
"""


def test_a_compiled_step_equals_the_step():
    """In a process without shape checks, which would be compiled too."""
    subprocess.run([sys.executable, "-W", "ignore", "-c", COMPILED], check=True)


TRAINED_TWICE = """
from pipeline.runtime.determinism import apply_determinism, set_deterministic_env
set_deterministic_env(True)
apply_determinism()
import hashlib
from tests.gpu.test_gpu import EXAMPLES, train
for name in EXAMPLES:
    weights = [run.model.state_dict() for run in train(name)]
    print(name, hashlib.sha256(b"".join(w.cpu().numpy().tobytes() for own in weights for w in own.values())).hexdigest())
"""


def test_deterministic_trains_every_mixer_to_the_same_bits():
    digests = [
        subprocess.run([sys.executable, "-W", "ignore", "-c", TRAINED_TWICE], check=True, capture_output=True, text=True).stdout
        for _ in range(2)
    ]
    assert digests[0] == digests[1]
    assert len(digests[0].splitlines()) == len(EXAMPLES)
