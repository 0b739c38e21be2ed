"""Diagnostics against models whose weights, and therefore attention, are known."""

import math

import pytest
import torch

from cat import theory
from cat.evaluation.diagnostics import (
    attention_maps,
    attention_statistics,
    attention_weights,
    filter_kernels,
    head_entropies,
    key_filter_solves_every_length,
    max_logit,
)
from cat.mixers.attention.config import only_keys_convolved
from cat.mixers.registry import model_config
from cat.tasks.copying import Copying
from cat.tasks.recall import Recall
from cat.tasks.registry import generator
from cat.training.fit import build_model
from tests.helpers.reference import close, normal

VOCABULARY, LENGTH = 11, 13
HEADS = {"width": 12, "layers": 1, "heads": 2, "position": "none"}
SIZES = {"length": 40, "multiples": [1, 2], "train_examples": 1, "valid_examples": 1, "test_examples": 1}


def build(**parameters):
    config = model_config(**{**HEADS, **parameters})
    return build_model(config, vocabulary=VOCABULARY, length=LENGTH, seed=0)


def recall_task(ngram, queries):
    pairs = 4 if ngram < 4 else 2
    return Recall(
        kind="recall", ngram=ngram, keys=4, values=5, filler=2, pairs=pairs, queries=queries, query_gap="uniform", **SIZES
    )


def copying_task(unique=True):
    return Copying(kind="copying", signals=3, alphabet=5, noise=4, unique=unique, **SIZES)


TASKS = {
    **{f"{n}-gram, {queries} queries": recall_task(n, queries) for n in (1, 3, 8) for queries in ("one", "all")},
    "copying": copying_task(),
    "repeated copying": copying_task(unique=False),
}


# Positions of answers.


@pytest.mark.parametrize("name", TASKS)
def test_answer_positions_hold_the_answer_of_an_earlier_occurrence(name):
    task = TASKS[name]
    examples = task.examples("test", 80, 16, generator(0, "sources", "test"))
    answer_positions = task.answer_positions(examples)
    assert ((answer_positions >= 0) == (examples.targets >= 0)).all()
    for tokens, targets, positions in zip(*examples, answer_positions, strict=True):
        queries = [i for i in range(80) if targets[i] >= 0]
        assert [tokens[positions[i]] for i in queries] == [targets[i] for i in queries]
        if isinstance(task, Recall):
            n = task.ngram
            for i in queries:
                assert positions[i] < i
                assert list(tokens[positions[i] - n : positions[i]]) == list(tokens[i - n + 1 : i + 1])
        else:
            assert [positions[i] for i in queries] == sorted({positions[i] for i in queries})
            assert max(positions) < queries[0]


# Attention.


@pytest.mark.parametrize("ngram", [1, 2, 3])
def test_the_construction_attends_only_to_the_answer(ngram):
    task = recall_task(ngram, "all")
    examples = task.examples("test", 80, 8, generator(0, "attention", "test"))
    model = theory.recall(vocabulary=task.vocabulary, ngram=ngram, length=80)
    is_target, answer_positions = torch.tensor(examples.targets >= 0), torch.tensor(task.answer_positions(examples))
    inputs = torch.tensor(examples.inputs)
    (on_answers,) = attention_statistics(model, inputs, is_target, answer_positions)
    assert on_answers.on_answer == pytest.approx(1, abs=1e-3)
    assert on_answers.entropy == pytest.approx(0, abs=1e-2)
    (elsewhere,) = attention_statistics(model, inputs, is_target, (answer_positions - 1).clamp(min=-1))
    assert elsewhere.on_answer < 1e-3
    (unknown,) = attention_statistics(model, inputs, is_target)
    assert unknown.on_answer is None
    assert unknown.entropy == on_answers.entropy


def test_uniform_attention_has_the_entropy_of_its_number_of_tokens():
    model = build(mixer="attention")
    with torch.no_grad():
        model.blocks[0].mixer.q_proj.weight.zero_()
    is_target = torch.zeros(3, LENGTH, dtype=torch.bool)
    is_target[:, 6] = True
    inputs, answer_positions = torch.zeros(3, LENGTH, dtype=torch.long), torch.where(is_target, 2, -1)
    (statistics,) = attention_statistics(model, inputs, is_target, answer_positions)
    assert statistics.entropy == pytest.approx(math.log(7))
    assert statistics.on_answer == pytest.approx(1 / 7)


@pytest.mark.parametrize(
    "parameters",
    [
        {"mixer": "attention", "conv_k": 3, "position": "alibi", "qk_norm": True},
        {"mixer": "linear", "conv_q": 3},
        {"mixer": "based", "window": 3, "position": "rotary"},
        {"mixer": "performer", "features": 5},
        {"mixer": "landmark", "block": 4, "top": 1, "conv_summary": 4},
    ],
    ids=lambda p: p["mixer"],
)
def test_attention_weights_are_causal_normalised_and_give_the_output(parameters):
    mixer = build(**parameters).blocks[0].mixer
    assert mixer.config.has_attention
    x = normal(2, LENGTH, 12).float()
    weights = attention_weights(mixer, x)
    assert weights.shape == (2, 2, LENGTH, LENGTH)
    assert (weights.triu(1) == 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, LENGTH))
    q, k, v, *others = mixer.prepare(mixer.project(x))
    torch.testing.assert_close(weights @ v, mixer.attend(q, k, v, *others), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "parameters",
    [
        {"mixer": "delta", **HEADS},
        {"mixer": "gla", **HEADS, "gate_rank": 2},
        {"mixer": "mamba"},
        {"mixer": "hyena", "conv_size": 2, "filter_size": 3},
    ],
)
def test_mixers_without_attention_have_no_statistics(parameters):
    config = model_config(**{"width": 12, **parameters, "layers": 2})
    model = build_model(config, vocabulary=VOCABULARY, length=LENGTH, seed=0)
    is_target = torch.ones(2, LENGTH, dtype=torch.bool)
    assert attention_statistics(model, torch.zeros(2, LENGTH, dtype=torch.long), is_target) == [None, None]
    assert attention_weights(model.blocks[0].mixer, normal(2, LENGTH, 12).float()) is None
    assert not config.has_attention


def test_negative_weights_have_no_statistics():
    model = build(mixer="linear", position="rotary")
    inputs = torch.zeros(1, LENGTH, dtype=torch.long)
    (block,) = model.blocks
    x = block.mixer_norm(model.embedding(inputs))
    with torch.no_grad():  # the channel that rotates by one radian per token dominates
        block.mixer.q_proj.weight[0] = block.mixer.k_proj.weight[0] = x[0, 0]
    q, k, v = block.mixer.prepare(block.mixer.project(x))
    assert block.mixer.attend(q, k, torch.eye(LENGTH).expand(*v.shape[:2], -1, -1)).min() < 0
    assert not model.config.has_attention
    assert attention_weights(block.mixer, x) is None
    assert attention_statistics(model, inputs, torch.ones(1, LENGTH, dtype=torch.bool)) == [None]


def test_statistics_of_each_layer_use_the_input_of_its_mixer():
    model = build(mixer="attention", layers=2, conv_k=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    mixer_inputs = []
    for block in model.blocks:
        block.register_forward_hook(lambda block, given, _: mixer_inputs.append((block.mixer, block.mixer_norm(given[0]))))
    inputs = torch.arange(2 * LENGTH).view(2, -1) % VOCABULARY
    is_target, answer_positions = torch.zeros(2, LENGTH, dtype=torch.bool), torch.full((2, LENGTH), -1)
    for sequence, position, answer in ((0, 4, 1), (0, 12, 9), (1, 7, 7)):
        is_target[sequence, position], answer_positions[sequence, position] = True, answer
    model(inputs)
    expected = []
    for mixer, x in list(mixer_inputs):
        weights = attention_weights(mixer, x)[[0, 0, 1], :, [4, 12, 7]].double()  # query, head, token
        entropies = [-sum(w * math.log(w) for w in row if w > 0) for row in weights.flatten(0, 1).tolist()]
        on_answer = weights[[0, 1, 2], :, [1, 9, 7]].mean(0).max().item()
        expected += [sum(entropies) / len(entropies), on_answer]
    actual = [value for layer in attention_statistics(model, inputs, is_target, answer_positions) for value in layer]
    assert actual == pytest.approx(expected, rel=1e-4)
    assert expected[:2] != expected[2:]


# Filters.


@pytest.mark.parametrize(
    ("parameters", "heads"),
    [
        ({"conv_q": 3, "conv_k": "full", "dilation": 2}, {"q": ["0", "1"], "k": ["0", "1"]}),
        ({"conv_v": 3, "sharing": "channel"}, {"v": ["0", "1"]}),
        ({"conv_k": 3, "sharing": "mixing"}, {"k": ["0>0", "1>0", "0>1", "1>1"]}),
        ({"conv_q": "network", "conv_k": "decay", "conv_v": "state", "filter_size": 3}, {p: ["0", "1"] for p in "qkv"}),
    ],
)
def test_filter_kernels_are_the_kernels_in_use(parameters, heads):
    model = build(mixer="attention", layers=2, filter_norm=True, **parameters)
    kernels = filter_kernels(model)
    assert [(f.layer, f.projection, f.head) for f in kernels] == [(n, p, h) for n in (1, 2) for p in heads for h in heads[p]]
    for entry in kernels:
        response = model.blocks[entry.layer - 1].mixer.filters[entry.projection].response(LENGTH)
        g, _, h = entry.head.partition(">")
        expected = response[int(h), int(g)] if h else response[int(g)]
        torch.testing.assert_close(torch.tensor(entry.kernel), expected.mean(0) if expected.ndim == 2 else expected)
        size = parameters[f"conv_{entry.projection}"]
        assert len(entry.kernel) == (size if isinstance(size, int) else LENGTH)
        assert entry.dilation == (parameters.get("dilation", 1) if isinstance(size, int) else 1)


def test_a_model_without_filters_has_no_kernels():
    assert filter_kernels(build(mixer="attention")) == []


# Whether a trained key filter solves every length.


def solver(kernel, **changes):
    """One layer whose tokens are orthonormal for queries and keys. Its first head has the key filter `kernel`."""
    model = build(**{"mixer": "attention", "width": 2 * VOCABULARY, "conv_k": len(kernel), **changes})
    mixer = model.blocks[0].mixer
    with torch.no_grad():
        model.embedding.token.weight.copy_(torch.eye(VOCABULARY, 2 * VOCABULARY))
        for projection in (mixer.q_proj, mixer.k_proj):  # the first head has the first half of the channels
            projection.weight.copy_(torch.eye(*projection.weight.shape) * (torch.arange(2 * VOCABULARY) < VOCABULARY))
        mixer.v_proj.weight.zero_()
        mixer.filters["k"].kernel.zero_()[0] = torch.tensor(kernel)
    return model


@pytest.mark.parametrize(
    ("kernel", "solves"),
    [([0.2, 1.0, 0.5], True), ([0.6, 1.0, 0.5], False), ([0.6, 0.5, 0.0], False), ([0.2, 1.0], True), ([0.2], False)],
)
def test_the_condition_is_that_of_the_kernel(kernel, solves):
    assert key_filter_solves_every_length(solver(kernel)) is solves


def test_the_condition_respects_the_dilation():
    assert key_filter_solves_every_length(solver([0.2, 1.0, 0.5], dilation=2)) is False  # F_1 is 0


def test_the_condition_is_applied_with_the_sign_of_the_scores():
    model = solver([-0.2, -1.0, -0.5])
    assert key_filter_solves_every_length(model) is False
    with torch.no_grad():
        model.blocks[0].mixer.q_proj.weight.mul_(-1)
    assert key_filter_solves_every_length(model) is True


def test_the_sign_compares_a_token_with_itself_and_with_any_other():
    model = solver([0.2, 1.0, 0.5])
    keys = model.blocks[0].mixer.k_proj.weight[:VOCABULARY]
    with torch.no_grad():
        keys[:, :VOCABULARY] = 10 - torch.eye(VOCABULARY)  # every score is positive, and smallest for equal tokens
    assert key_filter_solves_every_length(model) is False
    with torch.no_grad():
        model.blocks[0].mixer.filters["k"].kernel.neg_()
    assert key_filter_solves_every_length(model) is True


@pytest.mark.parametrize(
    "changes",
    [
        {"qk_norm": True},
        {"layers": 2},
        {"position": "rotary"},
        {"conv_q": 2},
        {"sharing": "channel"},
        {"filter_bias": True},
        {"window": 3},
        {"bias": True},
    ],
    ids=str,
)
def test_the_condition_applies_to_one_kind_of_model(changes):
    model, other = build(mixer="attention", conv_k=3), build(**{"mixer": "attention", "conv_k": 3, **changes})
    assert key_filter_solves_every_length(model) is not None
    assert key_filter_solves_every_length(other) is None
    assert only_keys_convolved(model.config)
    assert not only_keys_convolved(other.config)
    assert key_filter_solves_every_length(build(mixer="linear", conv_k=3)) is None


def test_the_condition_applies_to_the_heads_that_share_a_key_filter():
    model = solver([0.2, 1.0, 0.5], kv_heads=1)
    assert key_filter_solves_every_length(model) is True
    with torch.no_grad():
        model.blocks[0].mixer.filters["k"].kernel.neg_()
    assert key_filter_solves_every_length(model) is False


@pytest.mark.parametrize("changes", [{"kv_heads": 1}, {"window": 4}, {"dropout": 0.5}], ids=str)
def test_statistics_in_training_mode_are_those_without_dropout(changes):
    model = build(mixer="attention", conv_k=3, **changes).double()
    inputs = torch.randint(VOCABULARY, (3, LENGTH), generator=torch.Generator().manual_seed(0))
    (weights,) = attention_maps(model, inputs)
    mixer = model.blocks[0].mixer
    logits = mixer.logits(*mixer.prepare(mixer.project(model.blocks[0].mixer_norm(model.embedding(inputs))))[:2])
    close(logits.softmax(-1), weights)
    assert max_logit(model, inputs) == logits.max().item()
    assert model.training


def test_layers_without_attention_or_filters_are_left_out():
    attention = {"mixer": "attention", "heads": 2, "position": "rotary", "qk_norm": True, "conv_k": 3}
    config = model_config(mixer=["mamba", attention], width=12, layers=4)
    model = build_model(config, vocabulary=VOCABULARY, length=LENGTH, seed=0)
    tokens, everywhere = torch.zeros(2, LENGTH, dtype=torch.long), torch.ones(2, LENGTH, dtype=torch.bool)
    assert [statistics is None for statistics in attention_statistics(model, tokens, everywhere)] == 2 * [True, False]
    assert [heads and len(heads) for heads in head_entropies(model, tokens)] == 2 * [None, 2]
    with torch.no_grad():
        for layer in (1, 3):
            mixer = model.blocks[layer].mixer
            mixer.q_proj.weight.copy_(mixer.k_proj.weight)
            mixer.filters["k"].kernel.copy_(torch.eye(1, 3))
    assert max_logit(model, tokens) == pytest.approx(8)  # equal queries and keys, and 8 is the initial temperature
    assert [(kernel.layer, kernel.projection) for kernel in filter_kernels(model)] == [(2, "k"), (2, "k"), (4, "k"), (4, "k")]
    assert key_filter_solves_every_length(model) is None


# What precedes divergence.


@pytest.mark.parametrize(
    ("mixer", "position"),
    [("attention", "none"), ("attention", "rotary"), ("attention", "alibi"), ("landmark", "none"), ("landmark", "rotary")],
)
def test_the_softmax_of_the_logits_is_the_attention(mixer, position):
    changes = {"attention": {"conv_k": 3}, "landmark": {"block": 13, "top": 1}}[mixer]
    model = build(mixer=mixer, **changes, position=position, layers=2).double()
    inputs = torch.randint(VOCABULARY, (3, LENGTH), generator=torch.Generator().manual_seed(0))
    x, largest = model.embedding(inputs), []
    for block in model.layers():
        mixer, normed = block.mixer, block.mixer_norm(x)
        q, k, *_ = mixer.prepare(mixer.project(normed))
        logits = mixer.logits(q, k)
        torch.testing.assert_close(logits.softmax(-1), attention_weights(mixer, normed))
        largest.append(logits.max().item())
        x = block(x)
    assert max_logit(model, inputs) == pytest.approx(max(largest))


def test_max_logit_is_none_without_softmax_and_grows_with_the_queries():
    inputs = torch.randint(VOCABULARY, (3, LENGTH), generator=torch.Generator().manual_seed(0))
    assert max_logit(build(mixer="linear"), inputs) is None
    model = build(mixer="attention")
    before = max_logit(model, inputs)
    with torch.no_grad():
        model.layers()[0].mixer.q_proj.weight.mul_(10)
    assert max_logit(model, inputs) == pytest.approx(10 * before, rel=1e-4)


def test_the_entropy_of_each_head_is_that_of_its_attention():
    inputs = torch.randint(VOCABULARY, (3, LENGTH), generator=torch.Generator().manual_seed(0))
    model = build(mixer="attention", layers=2)
    with torch.no_grad():
        model.layers()[1].mixer.q_proj.weight[:6] = 0  # the first head then attends uniformly
    first, second = head_entropies(model, inputs)
    uniform = sum(math.log(n) for n in range(1, LENGTH + 1)) / LENGTH
    assert second[0] == pytest.approx(uniform, rel=1e-5)
    assert all(0 < entropy < uniform for entropy in (*first, second[1]))
    assert head_entropies(build(mixer="delta"), inputs) == [None]
