"""Training: reproducibility, early stopping, divergence, learning-rate schedule. Scores against counting by hand."""

import itertools
import math
import subprocess
import sys

import pytest
import torch

import cat.evaluation.scores
import cat.training.fit
from cat.config import TrainingConfig
from cat.evaluation.scores import MixedSplit, Scores, Split, score, token_scores
from cat.mixers.registry import model_config
from cat.model import SequenceModel
from cat.training.fit import batch_indices, build_model, draw_batches, fit, lr_scale, split_by_weight_decay
from cat.training.optimizer import AdamW

VOCABULARY, LENGTH = 11, 7
TRAINING = TrainingConfig(
    steps=30, batch=16, weight_decay=0.0, grad_clip=1.0, warmup=0.1, eval_every=5, early_stop_accuracy=1.0, early_stop_patience=2
)


def config(**changes):
    return model_config(**{"mixer": "attention", "width": 12, "layers": 1, "heads": 2, "conv_k": 3, **changes})


def successor(count=96, seed=0):
    """An easy task: the target at every other token is its number plus one."""
    return Split.of(*examples(count, seed))


def examples(count=96, seed=0):
    inputs = torch.randint(0, VOCABULARY, (count, LENGTH), generator=torch.Generator().manual_seed(seed))
    targets = torch.full_like(inputs, -100)
    targets[:, 2::2] = (inputs[:, 2::2] + 1) % VOCABULARY
    return inputs, targets


def build(seed=0, **changes):
    return build_model(config(**changes), vocabulary=VOCABULARY, length=LENGTH, seed=seed)


def run(*, seed=0, steps=30, rate=0.03, stop_early=True, training=None, train=None, resume=None, checkpoint=None, **changes):
    return fit(
        build(seed, **changes),
        train or successor(),
        successor(32, seed=1),
        config=TRAINING.model_copy(update={"steps": steps, **(training or {})}),
        learning_rate=rate,
        seed=seed,
        stop_early=stop_early,
        resume=resume,
        **({} if checkpoint is None else {"checkpoint": checkpoint}),
    )


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not():
    first, again, other = run(), run(), run(seed=1)
    assert first.history == again.history
    assert first.history != other.history
    for name, weight in first.model.state_dict().items():
        assert torch.equal(weight, again.model.state_dict()[name]), name


def test_global_random_state_is_neither_used_nor_changed():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = run(steps=5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert run(steps=5).history == first.history


def test_learns_and_stops_early_after_consecutive_validations():
    trained = run(steps=400)
    assert trained.stop == "accuracy"
    assert trained.steps < 400
    reached = [row.valid_accuracy >= TRAINING.early_stop_accuracy for row in trained.history]
    assert list(itertools.pairwise(reached)).index((True, True)) == len(reached) - TRAINING.early_stop_patience
    assert trained.history[-1].step == trained.steps


def test_runs_to_the_last_step_without_early_stopping():
    trained = run(steps=123, stop_early=False)
    assert (trained.stop, trained.steps) == ("steps", 123)
    assert [row.step for row in trained.history] == [*range(5, 123, 5), 123]


def test_divergence_is_recorded_with_its_step(monkeypatch):
    trained = run(rate=1.0, training={"grad_clip": 1e30}, steps=12)
    assert trained.stop == "steps"  # a bad learning rate alone is no divergence

    cross_entropy, calls = cat.training.fit.cross_entropy, []

    def nan_at_seven(*arguments):
        calls.append(None)
        return cross_entropy(*arguments) * (math.nan if len(calls) == 7 else 1.0)

    monkeypatch.setattr(cat.training.fit, "cross_entropy", nan_at_seven)
    monkeypatch.setattr(cat.training.fit, "score", lambda *_, **__: Scores(1.0, 0.5, 0.5))
    diverged = run(steps=30)
    assert (diverged.stop, diverged.steps) == ("diverged", 7)
    assert [row.step for row in diverged.history] == [5]


def test_bfloat16_trains_float32_weights():
    training = TRAINING.model_copy(update={"steps": 5, "batch": 8})
    options = {"config": training, "learning_rate": 0.01, "seed": 0, "stop_early": False}
    half = fit(build(), successor(), successor(16), precision="bfloat16", **options)
    assert all(weight.dtype == torch.float32 for weight in half.model.state_dict().values())
    full = fit(build(), successor(), successor(16), **options)
    assert half.history != full.history
    assert half.history[-1].valid_loss == pytest.approx(full.history[-1].valid_loss, rel=0.05)


def test_learning_rate_has_linear_warmup_and_cosine_decay():
    rates = [lr_scale(step, 100, 0.1) for step in range(1, 101)]
    assert rates[:10] == pytest.approx([i / 10 for i in range(1, 11)])
    assert rates[54] == pytest.approx(0.5)
    assert rates[-1] == 0
    assert all(a > b for a, b in itertools.pairwise(rates[9:]))
    assert lr_scale(1, 100, 0.0) == pytest.approx(1, abs=1e-3)


def test_an_epoch_has_each_example_at_most_once_in_a_new_order():
    batches = batch_indices(20, 6, seed=3)
    epochs = [torch.cat([next(batches) for _ in range(3)]) for _ in range(2)]
    for epoch in epochs:
        assert len(set(epoch.tolist())) == 18
    assert epochs[0].tolist() != epochs[1].tolist()
    assert next(batch_indices(20, 6, seed=3)).tolist() == epochs[0][:6].tolist()
    assert next(batch_indices(20, 6, seed=4)).tolist() != epochs[0][:6].tolist()


def test_one_split_has_the_batches_of_its_own_order():
    drawn, expected = draw_batches([20], 6, seed=3), batch_indices(20, 6, seed=3)
    for _ in range(10):
        split, rows = next(drawn)
        assert (split, rows.tolist()) == (0, next(expected).tolist())


def test_splits_take_turns_in_a_new_order_and_have_their_own_epochs():
    counts = [9, 9, 11]
    batches = list(itertools.islice(draw_batches(counts, 4, seed=3), 24))
    rounds = [[split for split, _ in batches[start : start + 3]] for start in range(0, 24, 3)]
    assert all(sorted(order) == [0, 1, 2] for order in rounds)
    assert len({tuple(order) for order in rounds}) > 2
    for split, count in enumerate(counts):
        own = [rows for index, rows in batches if index == split]
        for epoch in zip(own[::2], own[1::2], strict=True):
            assert len(set(torch.cat(epoch).tolist())) == 8
        assert max(map(max, own)) < count
    first, second = (next(rows.tolist() for index, rows in batches if index == split) for split in (0, 1))
    assert first != second
    again = itertools.islice(draw_batches(counts, 4, seed=3), 24)
    assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in zip(batches, again, strict=True))


def test_each_batch_has_one_of_the_training_lengths(monkeypatch):
    shapes, logits_at = [], SequenceModel.logits_at

    def recorded(model, tokens, positions):
        if torch.is_grad_enabled():
            shapes.append(tuple(tokens.shape))
        return logits_at(model, tokens, positions)

    monkeypatch.setattr(SequenceModel, "logits_at", recorded)
    inputs, targets = examples()
    shorter = Split.of(inputs[:, :5], targets[:, :5])
    run(steps=6, train=MixedSplit((shorter, successor())))
    assert sorted(shapes) == [(16, 5)] * 3 + [(16, LENGTH)] * 3
    assert run(steps=6, train=MixedSplit((successor(),))).history == run(steps=6).history


@pytest.mark.parametrize("tied", [False, True])
def test_weight_decay_is_only_on_linear_maps(tied):
    model = build(tied=tied, mlp=2, position="learned", qk_norm=True)
    decayed, others = split_by_weight_decay(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[id(p)] for p in decayed} == {
        *(f"blocks.0.mixer.{name}_proj.weight" for name in "qkvo"), "blocks.0.mlp.1.weight", "blocks.0.mlp.3.weight",
        *([] if tied else ["head.weight"]),
    }  # fmt: skip
    assert len(decayed) + len(others) == len(names)


def test_logits_at_are_the_logits_at_the_target_positions():
    model = build()
    inputs, targets = examples(5)
    targets[2, 4] = -100  # one target fewer than the others
    split = Split.of(inputs, targets)
    assert split.positions.tolist() == [[2, 4, 6]] * 2 + [[0, 2, 6]] + [[2, 4, 6]] * 2
    assert split.answers.tolist() == targets.gather(1, split.positions.long()).tolist()
    logits = model(inputs)
    expected = torch.stack([logits[row, positions] for row, positions in enumerate(split.positions)])
    torch.testing.assert_close(model.logits_at(inputs, split.positions.long()), expected)


@pytest.mark.parametrize(("name", "most"), [("TOKENS_AT_ONCE", 2 * LENGTH), ("LOGITS_AT_ONCE", 2 * 3 * VOCABULARY)])
def test_tokens_and_logits_of_a_chunk_are_limited(monkeypatch, name, most):
    monkeypatch.setitem(getattr(cat.evaluation.scores, name), "cpu", most)
    chunks = list(token_scores(build(), Split.of(*examples(5))))  # three targets per sequence
    assert [len(chunk.loss) for chunk in chunks] == [2, 2, 1]


def test_scores_are_those_counted_by_hand(monkeypatch):
    monkeypatch.setitem(cat.evaluation.scores.TOKENS_AT_ONCE, "cpu", 3 * LENGTH)  # several chunks, the last one smaller
    model = build()
    inputs, targets = examples(23)
    targets[3, 2] = -1  # negative: no target
    split = Split.of(inputs, targets)
    logits = model(inputs)
    losses, correct, correct_sequences = [], [], 0
    for row in range(23):
        all_correct = True
        for position in range(LENGTH):
            if (target := int(targets[row, position])) >= 0:
                losses.append(-logits[row, position].log_softmax(-1)[target].item())
                correct.append(int(logits[row, position].argmax()) == target)
                all_correct &= correct[-1]
        correct_sequences += all_correct
    scores = score(model, split)
    assert scores.loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert scores.accuracy == sum(correct) / len(correct)
    assert scores.sequence_accuracy == correct_sequences / 23
    assert scores.perplexity == pytest.approx(math.exp(scores.loss))
    assert scores.bits == pytest.approx(scores.loss / math.log(2))


def test_positions_without_target_do_not_count():
    model = build()
    inputs, targets = examples(6)
    targets = model(inputs).argmax(-1).masked_fill(targets < 0, -100)
    targets[2, 4] = -100
    assert score(model, Split.of(inputs, targets))[1:] == (1, 1)
    targets[4, 6] = (targets[4, 6] + 1) % VOCABULARY
    assert score(model, Split.of(inputs, targets))[1:] == (16 / 17, 5 / 6)


def test_autoregressive_scores_use_the_model_s_own_answers_as_inputs():
    model = build(2)
    inputs = successor(9).inputs
    first = 4
    own = inputs.clone()
    for position in range(first, LENGTH - 1):
        own[:, position + 1] = model(own)[:, position].argmax(-1)
    assert not torch.equal(own, inputs)

    targets = torch.full_like(inputs, -100)
    targets[:, first:] = model(own)[:, first:].argmax(-1)
    targets[0, -1] = (targets[0, -1] + 1) % VOCABULARY
    scores = score(model, Split.of(inputs, targets), autoregressive=True)
    assert scores.accuracy == pytest.approx(1 - 1 / (9 * (LENGTH - first)))
    assert scores.sequence_accuracy == 8 / 9
    assert score(model, Split.of(inputs, targets)).accuracy < scores.accuracy


def test_learned_positions_limit_the_length():
    model = build(position="learned")
    assert model.max_length == LENGTH
    with pytest.raises(ValueError, match=f"reach {LENGTH} tokens, not {LENGTH + 1}"):
        model(torch.zeros(2, LENGTH + 1, dtype=torch.long))
    assert build().max_length is None


def test_a_kernel_longer_than_the_training_sequence_is_refused():
    with pytest.raises(ValueError, match="conv_k = 8"):
        build(conv_k=8)
    assert build(conv_k="full").blocks[0].mixer.filters["k"].kernel.shape == (2, LENGTH)


@pytest.mark.parametrize("grad_clip", [0.05, 1e9])
def test_the_optimizer_equals_torch_adamw(grad_clip):
    """Twenty steps with the same gradients, one of them missing, at a changing learning rate."""
    shapes = [(3, 4), (5,), (2, 1), ()]
    first = [torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))) for shape in shapes]
    second = [torch.nn.Parameter(p.detach().clone()) for p in first]
    ours = AdamW(first[:2], first[2:], weight_decay=0.3, grad_clip=grad_clip)
    theirs = torch.optim.AdamW(
        [{"params": second[:2], "weight_decay": 0.3}, {"params": second[2:], "weight_decay": 0.0}], lr=1.0, foreach=False
    )
    generator = torch.Generator().manual_seed(7)
    for step in range(20):
        for our_parameter, their_parameter in zip(first, second, strict=True):
            our_parameter.grad = torch.randn(our_parameter.shape, generator=generator)
            their_parameter.grad = our_parameter.grad.clone()
        first[3].grad = None
        second[3].grad = torch.zeros(())
        ours.step(0.01 * (step + 1))
        assert all(p.grad is None for p in first)
        torch.nn.utils.clip_grad_norm_(second, grad_clip)
        for group in theirs.param_groups:
            group["lr"] = 0.01 * (step + 1)
        theirs.step()
    torch.testing.assert_close(first, second)


def test_gradients_of_micro_batches_sum_to_that_of_the_batch(monkeypatch):
    sizes, logits_at = [], SequenceModel.logits_at

    def counted(model, tokens, positions):
        sizes.append(len(tokens))
        return logits_at(model, tokens, positions)

    whole = run(steps=6)
    monkeypatch.setattr(SequenceModel, "logits_at", counted)
    split = run(steps=6, training={"micro_batch": 6})
    assert sizes[:3] == [6, 6, 4]
    assert split.micro_batch == 6
    for actual, expected in zip(split.history, whole.history, strict=True):
        assert actual.train_loss == pytest.approx(expected.train_loss, rel=1e-4)
        assert actual.grad_norm == pytest.approx(expected.grad_norm, rel=1e-3)


def test_dropout_is_resumed_to_the_same_bits_and_depends_on_the_seed_only():
    def stop_at(step):
        def checkpoint(state, ended):
            if state().step == step:
                raise Interrupted(state())

        return checkpoint

    options = {"steps": 8, "dropout": 0.3, "stop_early": False}
    torch.manual_seed(1)
    before = torch.get_rng_state()
    whole = run(**options)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    with pytest.raises(Interrupted) as interrupted:
        run(**options, checkpoint=stop_at(3))
    resumed = run(**options, resume=interrupted.value.args[0])
    assert resumed.history == whole.history
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], weight), name
    without = run(steps=8, stop_early=False)
    assert without.history != whole.history
    assert score(whole.model, successor(32, seed=1)) == score(whole.model, successor(32, seed=1))


class Interrupted(Exception):  # noqa: N818  not an error
    """Ends a run, with its state."""


COMPILED = """
from tests.cat.training.test_fit import run

plain = run(steps=6)
for training in ({"compile": True}, {"compile": True, "micro_batch": 6}):
    for actual, expected in zip(run(steps=6, training=training).history, plain.history, strict=True):
        assert abs(actual.train_loss - expected.train_loss) < 1e-4 * expected.train_loss, (actual, expected)
        assert abs(actual.valid_loss - expected.valid_loss) < 1e-3 * expected.valid_loss, (actual, expected)
"""


@pytest.mark.long
def test_a_compiled_step_equals_the_step():
    # In a process of its own: the compiler cannot trace the shape checks of the tests.
    subprocess.run([sys.executable, "-c", COMPILED], check=True)


def test_a_record_has_the_metrics_of_the_steps_before_it(monkeypatch):
    losses, norms = [], []
    step, backward = AdamW.step, cat.training.fit.backward

    def record_loss(*arguments, **options):
        loss, micro_batch = backward(*arguments, **options)
        losses.append(loss.item())
        return loss, micro_batch

    def record_norm(optimizer, learning_rate):
        norms.append(torch.cat([p.grad.flatten() for p in optimizer.parameters if p.grad is not None]).norm().item())
        return step(optimizer, learning_rate)

    monkeypatch.setattr(cat.training.fit, "backward", record_loss)
    monkeypatch.setattr(AdamW, "step", record_norm)
    for index, record in enumerate(run(steps=10, training={"grad_clip": 1e-3}).history):
        steps = slice(5 * index, 5 * index + 5)
        assert record.train_loss == pytest.approx(sum(losses[steps]) / 5)
        assert record.max_loss == max(losses[steps])
        assert record.grad_norm == pytest.approx(max(norms[steps]), rel=1e-5)  # the norm before clipping
