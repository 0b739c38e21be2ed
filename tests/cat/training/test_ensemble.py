"""Members of an ensemble against models trained alone: the same histories, weights and stop reasons, for every mixer."""

import math

import pytest
import torch
import torch.nn.functional as F

import cat.training.ensemble
from cat.config import TrainingConfig
from cat.evaluation.scores import Split
from cat.mixers.mamba.op import selective_scan
from cat.ops.conv.causal import filter_heads
from cat.training.ensemble import Ensemble, _project, _tokens_per_sum, can_ensemble, fit_ensemble
from cat.training.fit import batch_indices, build_model, fit
from tests.helpers.mixers import EXAMPLES, ONE_PER_MIXER, configure
from tests.helpers.reference import assert_matches_reference, normal

VOCABULARY, LENGTH = 11, 67  # longer than the chunks of every mixer
TRAINING = TrainingConfig(
    steps=3, batch=4, weight_decay=0.5, grad_clip=0.2, warmup=0.3, eval_every=2, early_stop_accuracy=1.0, early_stop_patience=2
)
GRID = [(1, 0.01), (0, 0.003)]
"""Seed and learning rate of each member."""
CAT = {"mixer": "attention", "width": 12, "heads": 2, "position": "learned", "conv_k": 3}


@pytest.fixture(autouse=True)
def _without_mamba_ssm(monkeypatch):
    monkeypatch.setattr("cat.mixers.mamba.op.fused_scan", lambda *arguments: None)


def successor(count, *, length=LENGTH, seed=0, tokens=VOCABULARY):
    """The target at every other token is its number plus one; some examples have one target fewer."""
    inputs = torch.randint(tokens, (count, length), generator=torch.Generator().manual_seed(seed))
    targets = torch.full_like(inputs, -100)
    targets[:, 2::2] = (inputs[:, 2::2] + 1) % tokens
    targets[::3, 2] = -100
    return Split.of(inputs, targets)


def train_both(parameters, *, grid=GRID, length=LENGTH, train=None, change=lambda models: None, training=None, **options):
    """Train a grid of (seed, learning rate) as an ensemble and one by one.

    Returns the runs of both, and per member the progress calls of both.
    """
    train = successor(18, length=length) if train is None else train
    valid = successor(7, length=length, seed=1, tokens=VOCABULARY - 1)
    options = {"config": TRAINING.model_copy(update=training or {}), "stop_early": False, **options}

    def build():
        models = [build_model(configure(**parameters), vocabulary=VOCABULARY, length=length, seed=seed) for seed, _ in grid]
        change(models)
        return models

    calls = [([], []) for _ in grid]
    seeds, rates = zip(*grid, strict=True)
    models = build()
    ensemble = fit_ensemble(
        models,
        train,
        valid,
        learning_rates=rates,
        seeds=seeds,
        progress=lambda index, *call: calls[index][0].append(call),
        **options,
    )
    assert all(run.model is model for run, model in zip(ensemble, models, strict=True))
    alone = [
        fit(model, train, valid, learning_rate=rate, seed=seed, progress=lambda *call, own=own: own[1].append(call), **options)
        for model, (seed, rate), own in zip(build(), grid, calls, strict=True)
    ]
    return ensemble, alone, calls


def assert_same(ensemble, alone, calls, *, rtol=1e-4, atol=1e-4):
    for ours, theirs, (our_calls, their_calls) in zip(ensemble, alone, calls, strict=True):
        assert (ours.stop, ours.steps) == (theirs.stop, theirs.steps)
        assert [record.step for record in ours.history] == [record.step for record in theirs.history]
        for record, expected in zip(ours.history, theirs.history, strict=True):
            assert (record.train_loss, record.valid_loss) == pytest.approx((expected.train_loss, expected.valid_loss), rel=rtol)
            assert record.valid_accuracy == pytest.approx(expected.valid_accuracy, abs=max(0.005, rtol))
        our_steps, their_steps = ([(step, record and record.step) for step, record in c] for c in (our_calls, their_calls))
        assert our_steps == their_steps
        assert [record for _, record in our_calls if record] == ours.history
        weights = ours.model.state_dict(), theirs.model.state_dict()
        torch.testing.assert_close(*weights, rtol=rtol, atol=atol, equal_nan=True)


ALONE = {"landmark_soft"}
"""Examples that train otherwise than they are evaluated, so that their runs train one by one."""


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name not in ALONE])
def test_every_mixer_trains_in_an_ensemble_as_it_does_alone(name):
    assert can_ensemble(configure(**EXAMPLES[name]))
    assert_same(*train_both({**EXAMPLES[name], "mlp": 2}, training={"steps": 2}))


@pytest.mark.parametrize("name", ONE_PER_MIXER)
def test_every_seed_with_every_learning_rate(name):
    assert_same(*train_both(EXAMPLES[name], grid=[(seed, rate) for seed in (0, 1, 2) for rate in (0.01, 0.003)]))


def test_a_model_with_several_mixers():
    mixers = [{"mixer": "mamba", "state": 3}, {"mixer": "attention", "heads": 2, "position": "rotary", "conv_k": 3}]
    assert_same(*train_both({"mixer": mixers, "width": 12, "layers": 4, "mlp": 2}, training={"steps": 5}))


@pytest.mark.parametrize(
    ("name", "length"), [("attention_channel", 131), ("attention_mixing", 257), ("hyena", 131), ("delta", 5), ("gla", 5)]
)
def test_lengths_with_other_convolution_algorithms(name, length):
    assert_same(*train_both(EXAMPLES[name], length=length))


@pytest.mark.parametrize(
    "changes",
    [
        {"tied": True, "layers": 2},
        {"position": "none"},
        {"position": "alibi", "layers": 2},
        {"mlp": 3, "conv_k": "full"},
        {"mlp": 2, "activation": "swiglu", "norm": "rms"},
        {"mlp": 2, "activation": "relu2", "canon": "ABCD"},
        {"layers": 2, "canon": "B"},
    ],
)
def test_tied_weights_and_projection_look_up(changes):
    assert_same(*train_both({**CAT, **changes}))


def test_dropout_cannot_be_ensembled():
    assert can_ensemble(configure(**CAT))
    assert not can_ensemble(configure(**{**CAT, "dropout": 0.1}))


def test_the_kernel_of_mamba_ssm_cannot_be_ensembled(monkeypatch):
    class Kernel(torch.autograd.Function):
        """Like the kernel of the package, without a vmap rule."""

        @staticmethod
        def forward(ctx, x, *others):
            return x.clone()

    monkeypatch.setattr("cat.mixers.mamba.op.fused_scan", lambda *arguments: Kernel.apply)
    refused = {name for name in EXAMPLES if not can_ensemble(configure(**EXAMPLES[name]))}
    assert refused == {"mamba", "mamba_small", "mamba_single"} | ALONE
    with pytest.raises(RuntimeError, match="vmap"):
        train_both(EXAMPLES["mamba"], length=5)


@pytest.mark.parametrize(("name", "length"), [("attention_all", 29), ("attention_k", 257), ("landmark_q", 29), ("mamba", 29)])
def test_bfloat16_trains_float32_weights_as_it_does_alone(name, length):
    grid = [(1, 0.01), (0, 0.0)]  # at learning rate 0, only the precision differs
    rough, exact = (train_both(EXAMPLES[name], length=length, grid=grid, precision=p) for p in ("bfloat16", "float32"))
    assert all(weight.dtype == torch.float32 for run in rough[0] for weight in run.model.state_dict().values())
    assert_same(*rough, rtol=0.02, atol=0.05)
    for record, exact_record in zip(rough[0][1].history, exact[0][1].history, strict=True):
        assert record.train_loss != exact_record.train_loss
        assert record.valid_loss != exact_record.valid_loss


def test_scores_in_chunks_equal_scores_at_once(monkeypatch):
    monkeypatch.setitem(cat.training.ensemble.TOKENS_AT_ONCE, "cpu", 3 * len(GRID) * LENGTH)  # chunks of 3, 3 and 1
    assert_same(*train_both(CAT))


# The end of a run.


@pytest.fixture
def sizes(monkeypatch):
    """Number of members in each step."""
    sizes, step = [], Ensemble.step

    def record(ensemble, *arguments):
        sizes.append(len(ensemble.weights))
        return step(ensemble, *arguments)

    monkeypatch.setattr(Ensemble, "step", record)
    return sizes


def test_members_that_stop_early_leave_the_others_training(sizes):
    training = {"weight_decay": 0.0, "grad_clip": 1.0, "warmup": 0.1, "early_stop_accuracy": 0.6, "steps": 21, "batch": 16}
    grid = [(0, 1e-5), (1, 0.03), (2, 1e-4), (3, 0.06)]
    runs = train_both(CAT, grid=grid, length=7, train=successor(96, length=7), training=training, stop_early=True)
    assert_same(*runs, atol=1e-3)
    assert [run.stop for run in runs[0]] == ["steps", "accuracy", "steps", "accuracy"]
    assert sizes == [sum(step < run.steps for run in runs[0]) for step in range(21)]


def test_training_ends_with_the_last_member(sizes):
    runs = train_both(CAT, training={"early_stop_accuracy": 1e-9, "steps": 9}, length=7, stop_early=True)
    assert_same(*runs)
    assert sizes == [len(GRID)] * 4


def test_a_diverged_member_does_not_change_the_others(sizes):
    runs = train_both(EXAMPLES["performer_state"], grid=[(0, 0.01), (1, 1e30), (2, 0.003)], training={"steps": 7})
    assert [run.stop for run in runs[0]] == ["steps", "diverged", "steps"]
    assert_same(*([entries[index] for index in (0, 2)] for entries in runs))
    assert (runs[0][1].steps, runs[0][1].history) == (runs[1][1].steps, runs[1][1].history)
    assert sizes == [3] * 2 + [2] * 5


def test_divergence_is_found_at_validation_and_recorded_with_its_step(sizes):
    """One model has a nan embedding for a token of its third batch: its loss is not finite from there on."""
    train = successor(18, tokens=VOCABULARY - 1)
    batches = batch_indices(18, 4, seed=1)
    third = [next(batches) for _ in range(3)][-1]
    train.inputs[third[0], 3] = VOCABULARY - 1

    def insert_nan(models):
        models[1].embedding.token.weight.data[VOCABULARY - 1] = math.nan

    runs = train_both(CAT, grid=[(0, 0.01), (1, 0.01), (2, 0.003)], training={"steps": 7}, train=train, change=insert_nan)
    assert_same(*runs)
    diverged = runs[0][1]
    assert (diverged.stop, diverged.steps, [row.step for row in diverged.history]) == ("diverged", 3, [2])
    assert sizes == [3] * 4 + [2] * 3


# Custom operations under vmap.


@pytest.mark.parametrize("length", [29, 67, 131])  # Toeplitz matrix, direct, FFT
@pytest.mark.parametrize("mapped", [(0, 0), (1, None), (None, 2)])
def test_vmap_of_a_filter_over_sequences_and_kernels(mapped, length):
    x, kernel = normal(2, 3, length, 5), normal(3, 19 if length == 131 else 4, seed=1)
    stacked = [t if axis is None else torch.stack([t, -2 * t, t + 1], axis) for t, axis in zip((x, kernel), mapped, strict=True)]
    assert_matches_reference(torch.vmap(filter_heads, mapped), one_by_one(filter_heads, mapped), *stacked)


@pytest.mark.parametrize("mapped", [(0, 0, 0, 0, 0), (1, None, None, 3, 0), (None, 3, 1, None, 2), (None, None, 0, None, None)])
def test_vmap_of_a_selective_scan_over_any_of_its_inputs(mapped):
    inputs = normal(2, 7, 5), normal(2, 7, 5, seed=1), normal(5, 3, seed=2), normal(2, 7, 3, seed=3), normal(2, 7, 3, seed=4)
    stacked = [t if axis is None else torch.stack([t, -t / 2, t + 1], axis) for t, axis in zip(inputs, mapped, strict=True)]
    assert_matches_reference(torch.vmap(selective_scan, mapped), one_by_one(selective_scan, mapped), *stacked)


def one_by_one(operation, mapped):
    """Reference implementation of torch.vmap."""

    def run(*inputs):
        rows = [[x] * 3 if axis is None else x.unbind(axis) for x, axis in zip(inputs, mapped, strict=True)]
        return torch.stack([operation(*row) for row in zip(*rows, strict=True)])

    return run


@pytest.mark.parametrize("max_weights", [cat.training.ensemble.MAX_SPLIT_WEIGHTS, 1])
@pytest.mark.parametrize("tokens", [(7,), (3, 5), (4, 256)])
@pytest.mark.parametrize("mapped", [(0, 0, 0), (None, 0, 0), (2, 1, None), (0, None, 0)])
def test_the_linear_map_for_gpus_equals_the_linear_map(mapped, tokens, max_weights, monkeypatch):
    """With a gradient in partial sums, and in one sum for few tokens or a large weight."""
    monkeypatch.setattr(cat.training.ensemble, "MAX_SPLIT_WEIGHTS", max_weights)
    shapes = [(*tokens, 6), (5, 6), (5,)]
    whole = [normal(*shape, seed=n) for n, shape in enumerate(shapes)]
    stacked = [t if axis is None else torch.stack([t, -2 * t, t + 1], axis) for t, axis in zip(whole, mapped, strict=True)]
    leaves = [t.requires_grad_() for t in stacked]
    weights = normal(3, *tokens, 5, seed=3)

    def passes(operation, count):
        y = torch.vmap(operation, mapped[:count])(*leaves[:count])
        return [y, *torch.autograd.grad(y, leaves[:count], weights)]

    for count in (2, 3):
        for ours, theirs in zip(passes(_project, count), passes(F.linear, count), strict=True):
            torch.testing.assert_close(ours, theirs)


def test_partial_sums_divide_the_tokens_if_they_pay():
    assert [_tokens_per_sum(*sizes) for sizes in [(8192, 64), (1000, 64), (192, 64), (8192, 1 << 20)]] == [512, 1000, 64, 8192]


def test_the_linear_map_gives_a_gradient_to_the_weight_only():
    x, weight = normal(128, 6), normal(3, 5, 6, seed=1).requires_grad_()
    y = torch.vmap(_project, (None, 0))(x, weight)
    (ours,) = torch.autograd.grad(y.sum(), weight)
    torch.testing.assert_close(ours, x.sum(0).expand(3, 5, 6))
