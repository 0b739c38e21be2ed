"""What is measured of a trained model: against models whose weights, and therefore attention, are known."""

import math

import pytest
import torch
from pydantic import TypeAdapter

from cat import theory
from cat.evaluation.diagnostics import (
    attention_statistics,
    attention_weights,
    filter_kernels,
    head_entropies,
    key_filter_solves_every_length,
    max_logit,
)
from cat.mixers.registry import AnyModel
from cat.tasks.registry import Copying, Recall, generator
from cat.training.fit import build_model
from tests.helpers.reference import normal

VOCABULARY, LENGTH = 11, 13
STREAMS = {"width": 12, "layers": 1, "heads": 2, "position": "none"}
SIZES = {"length": 40, "multiples": [1, 2], "train": 1, "valid": 1, "test": 1}


def build(**parameters):
    config = TypeAdapter(AnyModel).validate_python({**STREAMS, **parameters})
    return build_model(config, vocabulary=VOCABULARY, length=LENGTH, seed=0)


def recall_task(ngram, questions):
    pairs = 4 if ngram < 4 else 2
    return Recall(
        kind="recall", ngram=ngram, keys=4, values=5, filler=2, pairs=pairs, queries=questions, query_gap="uniform", **SIZES
    )


def copying_task(unique=True):
    return Copying(kind="copying", signals=3, alphabet=5, noise=4, unique=unique, **SIZES)


TASKS = {
    **{f"{n}-gram, {q} asked": recall_task(n, q) for n in range(1, 9) for q in ("one", "all")},
    "copying": copying_task(),
    "repeated copying": copying_task(unique=False),
}


# Where answers stand.


@pytest.mark.parametrize("name", TASKS)
def test_an_answer_stands_where_its_question_was_answered_before(name):
    task = TASKS[name]
    examples = task.examples("test", 80, 16, generator(0, "sources", "test"))
    sources = task.answer_positions(examples)
    assert ((sources >= 0) == (examples.targets >= 0)).all()
    for tokens, targets, where in zip(*examples, sources, strict=True):
        asked = [i for i in range(80) if targets[i] >= 0]
        assert [tokens[where[i]] for i in asked] == [targets[i] for i in asked]
        if isinstance(task, Recall):
            n = task.ngram
            for i in asked:
                assert where[i] < i
                assert list(tokens[where[i] - n : where[i]]) == list(tokens[i - n + 1 : i + 1])
        else:
            assert [where[i] for i in asked] == sorted({where[i] for i in asked})
            assert max(where) < asked[0]


# Attention.


@pytest.mark.parametrize("ngram", [1, 2, 3])
def test_the_theorem_attends_to_the_answer_alone(ngram):
    task = recall_task(ngram, "all")
    examples = task.examples("test", 80, 8, generator(0, "attention", "test"))
    model = theory.recall(vocabulary=task.vocabulary, ngram=ngram, length=80)
    inputs, asked, sources = (torch.tensor(x) for x in (examples.inputs, examples.targets >= 0, task.answer_positions(examples)))
    (seen,) = attention_statistics(model, inputs, asked, sources)
    assert seen.on_answer == pytest.approx(1, abs=1e-3)
    assert seen.entropy == pytest.approx(0, abs=1e-2)
    (elsewhere,) = attention_statistics(model, inputs, asked, (sources - 1).clamp(min=-1))
    assert elsewhere.on_answer < 1e-3
    (unknown,) = attention_statistics(model, inputs, asked)
    assert unknown.on_answer is None
    assert unknown.entropy == seen.entropy


def test_attention_that_is_spread_evenly_has_the_entropy_of_its_tokens():
    model = build(mixer="attention")
    with torch.no_grad():
        model.blocks[0].mixer.projection.weight[:12] = 0
    asked = torch.zeros(3, LENGTH, dtype=torch.bool)
    asked[:, 6] = True
    (seen,) = attention_statistics(model, torch.zeros(3, LENGTH, dtype=torch.long), asked, torch.where(asked, 2, -1))
    assert seen.entropy == pytest.approx(math.log(7))
    assert seen.on_answer == pytest.approx(1 / 7)


@pytest.mark.parametrize(
    "parameters",
    [
        {"mixer": "attention", "k": 3, "position": "alibi", "qk_norm": True},
        {"mixer": "linear", "q": 3},
        {"mixer": "based", "window": 3, "position": "rotary"},
        {"mixer": "performer", "features": 5},
        {"mixer": "landmark", "block": 4, "top": 1, "summary": 4},
    ],
    ids=lambda p: p["mixer"],
)
def test_weights_are_causal_shares_and_what_the_mixer_reads_with(parameters):
    mixer = build(**parameters).blocks[0].mixer
    assert mixer.config.attends
    x = normal(2, LENGTH, 12).float()
    weights = attention_weights(mixer, x)
    assert weights.shape == (2, 2, LENGTH, LENGTH)
    assert (weights.triu(1) == 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, LENGTH))
    q, k, v, *others = mixer.streams(mixer.project(x))
    torch.testing.assert_close(weights @ v, mixer.mix(q, k, v, *others), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "parameters",
    [
        {"mixer": "delta", **STREAMS},
        {"mixer": "gla", **STREAMS, "gate_rank": 2},
        {"mixer": "mamba"},
        {"mixer": "hyena", "conv": 2, "filter_size": 3},
    ],
)
def test_what_attends_to_nothing_has_no_statistics(parameters):
    config = TypeAdapter(AnyModel).validate_python({"width": 12, "layers": 2, **{**parameters, "layers": 2}})
    model = build_model(config, vocabulary=VOCABULARY, length=LENGTH, seed=0)
    asked = torch.ones(2, LENGTH, dtype=torch.bool)
    assert attention_statistics(model, torch.zeros(2, LENGTH, dtype=torch.long), asked) == [None, None]
    assert attention_weights(model.blocks[0].mixer, normal(2, LENGTH, 12).float()) is None
    assert not config.has_attention


def test_weights_that_are_negative_have_no_statistics():
    model = build(mixer="linear", position="rotary")
    inputs = torch.zeros(1, LENGTH, dtype=torch.long)
    (block,) = model.blocks
    x = block.mixer_norm(model.embedding(inputs))
    with torch.no_grad():  # the channel that turns by one radian a token is the largest by far
        block.mixer.projection.weight[0] = block.mixer.projection.weight[12] = x[0, 0]
    q, k, v = block.mixer.streams(block.mixer.project(x))
    assert block.mixer.mix(q, k, torch.eye(LENGTH).expand(*v.shape[:2], -1, -1)).min() < 0
    assert not model.config.has_attention
    assert attention_weights(block.mixer, x) is None
    assert attention_statistics(model, inputs, torch.ones(1, LENGTH, dtype=torch.bool)) == [None]


def test_every_layer_is_looked_at_with_what_its_mixer_is_given():
    model = build(mixer="attention", layers=2, k=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    given = []
    for block in model.blocks:
        block.register_forward_hook(lambda block, given_, _: given.append((block.mixer, block.mixer_norm(given_[0]))))
    inputs = torch.arange(2 * LENGTH).view(2, -1) % VOCABULARY
    asked, sources = torch.zeros(2, LENGTH, dtype=torch.bool), torch.full((2, LENGTH), -1)
    for row, place, source in ((0, 4, 1), (0, 12, 9), (1, 7, 7)):
        asked[row, place], sources[row, place] = True, source
    model(inputs)
    expected = []
    for mixer, x in list(given):
        rows = attention_weights(mixer, x)[[0, 0, 1], :, [4, 12, 7]].double()  # a question, a head, a token
        entropies = [-sum(w * math.log(w) for w in row if w > 0) for row in rows.flatten(0, 1).tolist()]
        on_answer = rows[[0, 1, 2], :, [1, 9, 7]].mean(0).max().item()
        expected += [sum(entropies) / len(entropies), on_answer]
    seen = [number for layer in attention_statistics(model, inputs, asked, sources) for number in layer]
    assert seen == pytest.approx(expected, rel=1e-4)
    assert expected[:2] != expected[2:]


# Filters.


@pytest.mark.parametrize(
    ("parameters", "rows"),
    [
        ({"q": 3, "k": "full", "dilation": 2}, {"q": ["0", "1"], "k": ["0", "1"]}),
        ({"v": 3, "sharing": "channel"}, {"v": ["0", "1"]}),
        ({"k": 3, "sharing": "mixing"}, {"k": ["0>0", "1>0", "0>1", "1>1"]}),
        ({"q": "network", "k": "decay", "v": "state", "filter_size": 3}, {s: ["0", "1"] for s in "qkv"}),
    ],
)
def test_filters_are_read_off_as_they_are_applied(parameters, rows):
    model = build(mixer="attention", layers=2, filter_norm=True, **parameters)
    found = filter_kernels(model)
    assert [(f.layer, f.projection, f.head) for f in found] == [(n, s, r) for n in (1, 2) for s in rows for r in rows[s]]
    for one in found:
        taps = model.blocks[one.layer - 1].mixer.filters[one.projection].response(LENGTH)
        g, _, h = one.head.partition(">")
        expected = taps[int(h), int(g)] if h else taps[int(g)]
        torch.testing.assert_close(torch.tensor(one.kernel), expected.mean(0) if expected.ndim == 2 else expected)
        assert len(one.kernel) == (parameters[one.projection] if isinstance(parameters[one.projection], int) else LENGTH)
        assert one.dilation == (parameters.get("dilation", 1) if isinstance(parameters[one.projection], int) else 1)


def test_mixers_without_filters_of_their_own_streams_have_no_taps():
    assert filter_kernels(build(mixer="attention")) == []


# Whether a trained key filter solves every length.


def solver(taps, **changes):
    """One layer whose tokens are orthonormal for queries and keys, with a key filter of two heads' `taps`."""
    model = build(**{"mixer": "attention", "width": 2 * VOCABULARY, "k": len(taps), **changes})
    mixer = model.blocks[0].mixer
    with torch.no_grad():
        model.embedding.token.weight.copy_(torch.eye(VOCABULARY, 2 * VOCABULARY))
        mixer.projection.weight.zero_()
        for row in range(VOCABULARY):  # the first head reads the first half as queries and as keys
            mixer.projection.weight[row, row] = mixer.projection.weight[2 * VOCABULARY + row, row] = 1
        mixer.filters["k"].taps.copy_(torch.tensor([taps, [0.0] * len(taps)]))
    return model


@pytest.mark.parametrize(
    ("taps", "solves"),
    [([0.2, 1.0, 0.5], True), ([0.6, 1.0, 0.5], False), ([0.6, 0.5, 0.0], False), ([0.2, 1.0], True), ([0.2], False)],
)
def test_the_condition_is_that_of_the_filter(taps, solves):
    assert key_filter_solves_every_length(solver(taps)) is solves


def test_the_condition_is_that_of_the_taps_where_they_are():
    assert key_filter_solves_every_length(solver([0.2, 1.0, 0.5], dilation=2)) is False  # nothing is read from one token back


def test_scores_of_the_other_sign_turn_the_condition_round():
    model = solver([-0.2, -1.0, -0.5])
    assert key_filter_solves_every_length(model) is False
    with torch.no_grad():
        model.blocks[0].mixer.projection.weight[:VOCABULARY] *= -1
    assert key_filter_solves_every_length(model) is True


def test_the_sign_is_that_of_a_token_s_own_key_beside_any_other():
    model = solver([0.2, 1.0, 0.5])
    keys = model.blocks[0].mixer.projection.weight[2 * VOCABULARY : 3 * VOCABULARY]
    with torch.no_grad():
        keys[:, :VOCABULARY] = 10 - torch.eye(VOCABULARY)  # every score is positive, and least where the tokens are the same
    assert key_filter_solves_every_length(model) is False
    with torch.no_grad():
        model.blocks[0].mixer.filters["k"].taps.neg_()
    assert key_filter_solves_every_length(model) is True


@pytest.mark.parametrize(
    "changes",
    [{"qk_norm": True}, {"layers": 2}, {"position": "rotary"}, {"q": 2}, {"sharing": "channel"}, {"filter_bias": True}],
    ids=str,
)
def test_the_condition_is_about_one_kind_of_model_alone(changes):
    it, other = build(mixer="attention", k=3), build(**{"mixer": "attention", "k": 3, **changes})
    assert key_filter_solves_every_length(it) is not None
    assert key_filter_solves_every_length(other) is None
    assert it.config.only_keys_convolved
    assert not other.config.only_keys_convolved
    assert key_filter_solves_every_length(build(mixer="linear", k=3)) is None


# What goes before divergence.


@pytest.mark.parametrize("position", ["none", "rotary", "alibi"])
@pytest.mark.parametrize("kind", [{"mixer": "attention", "k": 3}, {"mixer": "landmark", "block": 13, "top": 1}])
def test_the_logits_are_what_the_softmax_is_taken_of(kind, position):
    if kind["mixer"] == "landmark" and position == "alibi":
        pytest.skip("refused")
    model = build(**kind, position=position, layers=2).double()
    inputs = torch.randint(VOCABULARY, (3, LENGTH), generator=torch.Generator().manual_seed(0))
    x, largest = model.embedding(inputs), []
    for block in model.layers():
        mixer, normed = block.mixer, block.mixer_norm(x)
        q, k, *_ = mixer.streams(mixer.project(normed))
        logits = mixer.logits(q, k)
        torch.testing.assert_close(logits.softmax(-1), attention_weights(mixer, normed))
        largest.append(logits.max().item())
        x = block(x)
    assert max_logit(model, inputs) == pytest.approx(max(largest))


def test_what_has_no_softmax_has_no_logits_and_keys_that_grow_have_large_ones():
    inputs = torch.randint(VOCABULARY, (3, LENGTH), generator=torch.Generator().manual_seed(0))
    assert max_logit(build(mixer="linear"), inputs) is None
    model = build(mixer="attention")
    before = max_logit(model, inputs)
    with torch.no_grad():
        model.layers()[0].mixer.projection.weight[:12] *= 10  # of the queries
    assert max_logit(model, inputs) == pytest.approx(10 * before, rel=1e-4)


def test_the_entropy_of_each_head_is_that_of_its_attention():
    inputs = torch.randint(VOCABULARY, (3, LENGTH), generator=torch.Generator().manual_seed(0))
    model = build(mixer="attention", layers=2)
    with torch.no_grad():
        model.layers()[1].mixer.projection.weight[:6] = 0  # the queries of the first head, which then reads all alike
    first, second = head_entropies(model, inputs)
    even = sum(math.log(n) for n in range(1, LENGTH + 1)) / LENGTH
    assert second[0] == pytest.approx(even, rel=1e-5)
    assert all(0 < entropy < even for entropy in (*first, second[1]))
    assert head_entropies(build(mixer="delta"), inputs) == [None]
