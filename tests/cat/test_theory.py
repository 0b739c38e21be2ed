"""The theorems as tests: constructions solve the tasks of the study at every length, and necessary parts are necessary."""

import math
from itertools import permutations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cat import theory
from cat.config import ModelConfig
from cat.evaluation.diagnostics import solves_every_length
from cat.evaluation.scores import Split, score
from cat.mixers.landmark.layer import LandmarkAttention
from cat.model import SequenceModel
from cat.ops.attention import attend
from cat.ops.conv.causal import filter_heads
from cat.tasks.copying import Copying
from cat.tasks.recall import Recall
from cat.tasks.registry import Task, generator
from cat.training.fit import build_model

SPLITS = {"train_examples": 1, "valid_examples": 1, "test_examples": 1}
LENGTHS, LONGEST, EPSILON = (16, 64, 256, 1024), 1024, 1e-3
KEYS = {1: 12, 2: 6, 3: 4, 4: 3, 5: 2}
"""Keys per N: few enough that the longest sequences contain every N-gram, also those that differ by order or one token."""


def recall_task(ngram: int, queries: str = "one") -> Recall:
    """A task with 30 tokens and as many pairs as fit."""
    slot = ngram + 1
    length = 16 if queries == "one" else 64
    pairs = (length - 1 - ngram) // slot if queries == "one" else (length - 1) // (2 * slot)
    return Recall(
        kind="recall",
        length=length,
        multiples=[n / length for n in LENGTHS if n >= length],
        ngram=ngram,
        keys=KEYS[ngram],
        values=26 - KEYS[ngram],
        filler=3,
        pairs=min(pairs, KEYS[ngram] ** ngram),
        queries=queries,
        query_gap="uniform",
        **SPLITS,
    )


def copying_task(signals: int, alphabet: int, length: int = 64, noise: int = 7, unique: bool = True) -> Copying:
    multiples = [n / length for n in LENGTHS if n >= length] if length in LENGTHS else [1]
    return Copying(
        kind="copying",
        length=length,
        multiples=multiples,
        signals=signals,
        alphabet=alphabet,
        noise=noise,
        unique=unique,
        **SPLITS,
    )


def draw(task: Task, length: int, count: int) -> Split:
    return Split.of(*map(torch.tensor, task.examples("test", length, count, generator(0, "theory", "test"))))


def accuracy(model: SequenceModel, task: Task, length: int, count: int = 32) -> float:
    return score(model, draw(task, length, count), autoregressive=task.autoregressive).accuracy


@torch.no_grad()
def error(model: SequenceModel, inputs: Tensor, is_target: Tensor, answers: Tensor) -> float:
    """Return the largest L1 distance between the attention output and the embedding of the answer."""
    (block,) = model.layers()
    outputs = block.mixer.mix(block.project(model.embedding(inputs)))[is_target]
    # The head reads the channels of the output, and its weights are the embedding.
    return (outputs - model.head.weight[answers]).abs().sum(-1).max().item()


def max_error(model: SequenceModel, split: Split) -> float:
    inputs, positions, answers = split.rows(slice(None))
    is_target = torch.zeros_like(inputs).scatter(1, positions, 1).bool()
    return error(model, inputs, is_target, answers.flatten())


def sequence(*tokens: int) -> tuple[Tensor, Tensor]:
    """One sequence whose only target is at its last position."""
    inputs = torch.tensor([tokens])
    return inputs, torch.arange(len(tokens))[None] == len(tokens) - 1


# N-gram recall: theorem 1.


@pytest.mark.parametrize("ngram", [1, 2, 3, 4])
@pytest.mark.parametrize("queries", ["one", "all"])
def test_one_layer_recalls_n_grams_at_every_length(ngram, queries):
    task = recall_task(ngram, queries)
    model = theory.recall(vocabulary=30, ngram=ngram, length=LONGEST)
    margin = theory.ngram_margin(0.5 ** torch.arange(ngram))
    c = theory.temperature(margin, LONGEST, EPSILON)
    assert task.vocabulary == 30
    assert task.pairs_at(LONGEST) == KEYS[ngram] ** ngram
    for length in task.lengths:
        examples = draw(task, length, count=8)
        assert score(model, examples).sequence_accuracy == 1
        assert max_error(model, examples) <= theory.error_bound(margin, length, c) + 2e-6  # the rounding of float32
    assert theory.error_bound(margin, LONGEST, c) < EPSILON / 2


def test_temperatures_are_those_of_the_margins():
    margins = [theory.ngram_margin(0.5 ** torch.arange(n)) for n in (1, 2, 3, 4)]
    assert [round(theory.temperature(m, LONGEST, EPSILON)) for m in margins] == [15, 144, 1119, 5991]
    for ngram, margin in enumerate(margins, 1):
        log_temperature = theory.recall(vocabulary=3, ngram=ngram, length=LONGEST).layers()[0].mixer.log_temperature
        assert log_temperature.exp().item() == pytest.approx(theory.temperature(margin, LONGEST, EPSILON), rel=1e-5)


def test_the_margin_is_the_distance_of_the_closest_n_grams():
    kernel = torch.tensor([0.9, -0.2, 0.4])
    vectors = {
        ngram: F.normalize(sum(kernel[j] * torch.eye(4)[ngram[j]] for j in range(3)), dim=0)
        for ngram in torch.cartesian_prod(*[torch.arange(4)] * 3).tolist()
        for ngram in [tuple(ngram)]
    }
    closest = max((a @ b).item() for a, b in permutations(vectors.values(), 2))
    assert theory.ngram_margin(kernel) == pytest.approx(1 - closest, abs=1e-6)


@pytest.mark.parametrize("ngram", [2, 3, 4])
def test_the_bound_is_reached_by_the_closest_n_grams(ngram):
    u, v, w, wrong = 1, 2, 3, 4
    copies = 1000 // (ngram + 1)
    inputs, is_target = sequence(0, *[v, *[u] * (ngram - 1), wrong] * copies, *[u] * ngram, w, *[u] * ngram)
    model = theory.recall(vocabulary=5, ngram=ngram, length=inputs.shape[1])
    margin = theory.ngram_margin(0.5 ** torch.arange(ngram))
    c = theory.temperature(margin, inputs.shape[1], EPSILON)
    reached = error(model, inputs, is_target, torch.tensor([w]))
    assert reached == pytest.approx(2 * copies * math.exp(-c * margin), rel=0.02)
    assert reached < theory.error_bound(margin, inputs.shape[1], c)


@pytest.mark.parametrize(("decay", "worse"), [(0.54, 0.5), (0.5, 0.7)])
def test_the_decay_decides_the_margin(decay, worse):
    margins = [theory.ngram_margin(a ** torch.arange(3)) for a in (decay, worse)]
    assert margins[0] > margins[1] > 0
    model = theory.recall(vocabulary=30, ngram=3, length=LONGEST, decay=worse)
    assert accuracy(model, recall_task(3), LONGEST, count=8) == 1


# Necessary parts of the construction for N-gram recall.


def changed(model: SequenceModel, **changes: object) -> SequenceModel:
    """Return a model with the changed configuration and the same weights. Without qk_norm, the temperature scales the queries."""
    config = with_mixer(model, **changes)
    other = build_model(config, vocabulary=model.head.out_features, length=model.length, seed=0)
    other.load_state_dict(model.state_dict(), strict=False)
    if not config.mixers[0].qk_norm:
        c = model.layers()[0].mixer.log_temperature.exp().item()
        with torch.no_grad():
            other.layers()[0].mixer.q_proj.weight.mul_(c * math.sqrt(config.width))
    return other


def with_mixer(model: SequenceModel, **changes: object) -> ModelConfig:
    """Return the configuration of a model of one layer with another mixer configuration."""
    (mixer,) = model.config.mixers
    return model.config.model_copy(update={"mixers": (mixer.model_copy(update=changes),)})


def with_kernel(model: SequenceModel, kernel: Tensor) -> SequenceModel:
    filters = model.layers()[0].mixer.filters
    with torch.no_grad():
        filters["q"].kernel.copy_(kernel)
        filters["k"].kernel.copy_(F.pad(kernel, (1, 0)))
    return model


def test_a_kernel_that_ignores_order_fails():
    assert theory.ngram_margin(torch.ones(3)) == pytest.approx(0, abs=1e-12)
    model = theory.recall(vocabulary=30, ngram=3, length=LONGEST)
    assert accuracy(model, recall_task(3), 256) == 1
    assert accuracy(with_kernel(model, torch.ones(3)), recall_task(3), 256) < 0.8


def test_a_kernel_shorter_than_the_n_gram_fails():
    assert accuracy(theory.recall(vocabulary=30, ngram=2, length=LONGEST), recall_task(3), 256) < 0.7


def test_a_key_filter_without_its_oldest_kernel_value_fails():
    model = theory.recall(vocabulary=30, ngram=3, length=LONGEST)
    with torch.no_grad():
        model.layers()[0].mixer.filters["k"].kernel[:, 3] = 0
    assert accuracy(model, recall_task(3), 256) < 0.8


def test_recall_without_qk_normalisation_fails():
    model = theory.recall(vocabulary=30, ngram=2, length=LONGEST)
    assert accuracy(model, recall_task(2), 64, count=256) == 1
    assert accuracy(changed(model, qk_norm=False), recall_task(2), 64, count=256) < 0.95


def test_attention_without_filters_and_positions_ignores_order():
    plain = changed(theory.recall(vocabulary=30, ngram=1, length=LONGEST), conv_q=None, conv_k=None)
    assert accuracy(plain, recall_task(1), 64) < 0.2
    inputs = draw(recall_task(1), 64, count=4).inputs
    shuffled = inputs[:, [*torch.randperm(63, generator=torch.Generator().manual_seed(0)).tolist(), 63]]
    torch.testing.assert_close(plain(shuffled)[:, -1], plain(inputs)[:, -1])


def test_without_bos_a_first_token_ties_with_its_repetition():
    u, v, w, filler = 1, 2, 3, 4
    model = theory.recall(vocabulary=5, ngram=2, length=LONGEST)
    tokens = [u, v, filler, u, u, w, filler, u, u]
    assert error(model, *sequence(0, *tokens), torch.tensor([w])) < EPSILON
    assert error(model, *sequence(*tokens), torch.tensor([w])) == pytest.approx(1, abs=EPSILON)


# Unique selective copying.


@pytest.mark.parametrize(("signals", "alphabet", "count"), [(1, 1, 8), (4, 4, 8), (8, 16, 4)])
def test_one_layer_copies_at_every_length_with_one_set_of_weights(signals, alphabet, count):
    task = copying_task(signals, alphabet)
    model = theory.copying(alphabet=alphabet, noise=7, length=LONGEST)
    margin = theory.copying_margin(LONGEST)
    c = theory.temperature(margin, LONGEST, EPSILON)
    for length in task.lengths:
        examples = draw(task, length, count)
        assert score(model, examples, autoregressive=True).sequence_accuracy == 1
        assert max_error(model, examples) <= theory.error_bound(margin, length, c)


def test_the_bound_is_reached_by_the_oldest_neighbours():
    first, second, noise, length = 2, 3, 4, 256
    inputs, is_target = sequence(0, first, second, *[noise] * (length - 4), 1)
    model = theory.copying(alphabet=2, noise=1, length=length, epsilon=1.0)
    margin = theory.copying_margin(length)
    c = theory.temperature(margin, length, 1.0)
    reached = error(model, inputs, is_target, torch.tensor([first]))
    rho = 1 - 1 / length
    assert reached == pytest.approx(2 * math.exp(-c * (rho ** (length - 3) - rho ** (length - 2))), rel=0.02)
    assert reached < theory.error_bound(margin, length, c)


@pytest.mark.parametrize("length", [1, 7, 2000])
def test_the_query_filter_covers_all_tokens_at_any_length(length):
    query_filter = theory.copying(alphabet=2, noise=1, length=100).layers()[0].mixer.filters["q"]
    torch.testing.assert_close(query_filter.response(length)[0], 0.99 ** torch.arange(length), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("longest", [511, 4095])
def test_a_context_of_only_signals_is_copied(longest):
    """Teacher-forced: if every answer is correct, the inputs equal those of the autoregressive run."""
    signals = 255
    task = copying_task(signals, signals, length=511)
    model = theory.copying(alphabet=signals, noise=7, length=longest)
    examples = draw(task, 511, count=1)
    assert score(model, examples).accuracy == 1
    assert max_error(model, examples) < EPSILON


def test_the_separator_ends_the_copy():
    model = theory.copying(alphabet=4, noise=3, length=LONGEST)
    for middle in range(5):
        signals = [5, 3, 4, 2][:middle]
        noise = [6 + i % 3 for i in range(1000)]
        tokens = torch.tensor([[0, *noise[:500], *signals, *noise[500:], 1, *signals]])
        assert model(tokens)[0, -1].argmax() == 1


def test_copying_needs_its_filter_and_signals_that_occur_once():
    task, model = copying_task(8, 16), theory.copying(alphabet=16, noise=7, length=64)
    assert accuracy(model, task, 64) == 1
    assert accuracy(model, copying_task(8, 16, unique=False), 64) < 0.7
    with torch.no_grad():
        model.layers()[0].mixer.filters["q"].log_rate.fill_(5)  # nearly the identity
    assert accuracy(model, task, 64) < 0.5


def test_copying_fails_beyond_its_length():
    model = theory.copying(alphabet=16, noise=7, length=64)
    assert max_error(model, draw(copying_task(8, 16), 64, count=8)) < EPSILON
    assert max_error(model, draw(copying_task(8, 16), 1024, count=8)) > 1


# Constructions for a task.


@pytest.mark.parametrize("task", [recall_task(1), recall_task(3, "all"), copying_task(4, 9)])
def test_the_construction_solves_the_task_at_its_longest_length(task):
    model, longest = theory.construct(task), task.lengths[-1]
    assert accuracy(model, task, longest, count=4) == 1
    assert max_error(model, draw(task, longest, count=4)) < EPSILON


@pytest.mark.parametrize(
    ("task", "words"),
    [
        (copying_task(4, 9, unique=False), "unique"),
        (recall_task(1).model_copy(update={"ngram": 5}), "ngram = 5"),
    ],
)
def test_a_task_without_a_construction_is_refused(task, words):
    with pytest.raises(ValueError, match=words):
        theory.construct(task)


def test_the_global_random_state_is_untouched():
    before = torch.random.get_rng_state()
    theory.recall(vocabulary=5, ngram=2, length=16)
    theory.copying(alphabet=2, noise=1, length=16)
    theory.random_context(width=5, length=16, block=BLOCK, count=2, generator=torch.Generator().manual_seed(0))
    retrieval(5, 4)
    assert torch.equal(torch.random.get_rng_state(), before)


# Key filters that solve recall at every length.


def test_the_condition_on_key_filters_is_what_hard_attention_does():
    """On every context of associative recall up to a length, up to renaming of tokens: u at `first` and at the end.

    The value after u is not u, as in tasks whose keys are no values.
    """
    filters, size = 3000, 4
    kernels = torch.randn(filters, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    solved = torch.ones(filters, dtype=torch.bool)
    for length in range(2, 2 * size):
        for first in range(length - 2):
            tokens = torch.arange(length)
            tokens[-1] = first
            x = torch.eye(length, dtype=torch.float64)[tokens].expand(1, filters, length, length)
            output = attend(x, filter_heads(x, kernels), x, scale=1e9)[0, :, -1]
            solved &= output[:, tokens[first + 1]] > 0.999
    assert 0.05 < solved.double().mean() < 0.5
    assert torch.equal(solves_every_length(kernels), solved)


@pytest.mark.parametrize(("kernel", "solves"), [([0.2, 1, 0.5], True), ([0.6, 1, 0.5], False), ([0.6, 0.5, 0], False)])
def test_a_key_filter_that_meets_the_condition_solves_recall_in_a_model(kernel, solves):
    model = theory.recall(vocabulary=30, ngram=1, length=LONGEST)
    config = with_mixer(model, conv_q=None, conv_k=3, qk_norm=False)
    other = build_model(config, vocabulary=30, length=LONGEST, seed=0)
    weights = model.state_dict() | {"blocks.0.mixer.filters.k.kernel": torch.tensor([kernel])}
    weights["blocks.0.mixer.q_proj.weight"] *= 1e3
    other.load_state_dict(weights, strict=False)
    assert solves_every_length(torch.tensor(kernel)) == solves
    assert (accuracy(other, recall_task(1), 16, count=64) == 1) == solves


# Landmarks in the random context model.

BLOCK, BLOCKS = 4, 32


def wrong_blocks(mixer: LandmarkAttention, blocks: int, count: int) -> float:
    """Return the share of sequences whose last token attends to a block before its own that does not hold its copy."""
    x, position = theory.random_context(
        width=mixer.width, length=blocks * BLOCK, block=BLOCK, count=count, generator=torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        q, k, v, *others = mixer.prepare(mixer.project(x))
    # The gradient is the attention. It may continue after the end of the block, so its first token identifies the block.
    v.requires_grad_()
    attention = torch.autograd.grad(mixer.attend(q, k, v, *others)[:, 0, -1, 0].sum(), v)[0][:, 0, :, 0]
    attended = (attention > 0).int().argmax(-1)
    return (attended // BLOCK != position // BLOCK).double().mean().item()


def retrieval(width: int, blocks: int, kernel: Tensor | None = None) -> LandmarkAttention:
    return theory.block_retrieval(width=width, length=blocks * BLOCK, block=BLOCK, kernel=kernel)


def test_a_random_context_contains_the_query_twice_among_noise():
    x, position = theory.random_context(width=500, length=14, block=BLOCK, count=300, generator=torch.Generator().manual_seed(0))
    assert set(position.tolist()) == set(range(12))  # all blocks before that of the last token
    assert torch.equal(x[torch.arange(300), position], x[:, -1])
    torch.testing.assert_close(x[:, -1].norm(dim=-1), torch.ones(300))
    noise = x[:, :-1][torch.arange(13) != position[:, None]]
    assert noise.mean().item() == pytest.approx(0, abs=1e-3)
    assert noise.square().sum(-1).mean().item() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("width", [2, 7, 14, 28])
def test_one_other_block_misleads_as_often_as_a_gaussian_exceeds_its_mean(width):
    exact = math.erfc(math.sqrt(width / (2 * (2 * BLOCK - 1)))) / 2
    count = 4000
    assert wrong_blocks(retrieval(width, 3), 3, count) == pytest.approx(exact, abs=3 * math.sqrt(exact / count))
    assert exact <= theory.wrong_block_bound(width, BLOCK, BLOCK)


@pytest.mark.parametrize("factor", [4, 6, 8])
def test_a_box_filter_retrieves_the_right_block_as_often_as_the_bound_says(factor):
    width = round(factor * BLOCK * math.log(BLOCKS))
    assert wrong_blocks(retrieval(width, BLOCKS), BLOCKS, 200) <= theory.wrong_block_bound(width, BLOCKS * BLOCK, BLOCK)


@pytest.mark.parametrize("epsilon", [0.5, 0.1])
def test_a_sufficient_width_is_sufficient(epsilon):
    width = theory.sufficient_width(BLOCKS * BLOCK, BLOCK, epsilon)
    assert theory.wrong_block_bound(width, BLOCKS * BLOCK, BLOCK) <= epsilon / 2
    assert wrong_blocks(retrieval(width, BLOCKS), BLOCKS, 200) <= epsilon / 2


def test_an_exponential_filter_needs_more_channels_than_a_box():
    decays = (1 - 1 / BLOCK) ** torch.arange(BLOCKS * BLOCK)
    widths = [round(factor * BLOCK * math.log(BLOCKS)) for factor in (4, 16)]
    box = [wrong_blocks(retrieval(width, BLOCKS), BLOCKS, 200) for width in widths]
    exponential = [wrong_blocks(retrieval(width, BLOCKS, decays), BLOCKS, 200) for width in widths]
    assert 2 * box[0] < exponential[0] < 0.25
    assert box[1] <= exponential[1] < 0.05


def test_landmarks_without_a_filter_or_without_channels_mislead():
    width = theory.sufficient_width(BLOCKS * BLOCK, BLOCK, 0.1)
    assert wrong_blocks(retrieval(width, BLOCKS, torch.ones(1)), BLOCKS, 200) > 0.6
    assert wrong_blocks(retrieval(BLOCK, BLOCKS), BLOCKS, 200) > 0.6
