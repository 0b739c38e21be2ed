"""Which places of a convolution solve recall and copying in one layer: constructions, and arguments why others cannot.

An argument is a pair of contexts with different answers for which all weights give the same output, or several contexts of which
all weights answer one wrongly. So it is tested on random weights, and on a construction that does tell the contexts apart.
"""

import pytest
import torch

from cat import theory
from cat.mixers.registry import model_config
from cat.model import SequenceModel
from cat.tasks.copying import CONSTRUCTIONS as COPYING
from cat.tasks.recall import CONSTRUCTIONS as RECALL
from cat.training.fit import build_model
from tests.cat.test_theory import LONGEST, accuracy, copying_task, draw, max_error, recall_task

BOS, U, V, T, A, B, F = range(7)
"""Keys u, v and t, values a and b, and filler f."""
GAP = (F,) * 10
"""Longer than the reach of kernels of 4 values on queries, and at both places in the MLP."""
MLP, CHANNEL = {"mlp": 2}, {"sharing": "channel"}


@pytest.mark.parametrize(("placement", "ngram"), [(place, n) for place, most in RECALL.items() for n in range(1, most + 1)])
def test_one_layer_recalls_with_the_convolution_at_other_places(placement, ngram):
    task = recall_task(ngram)
    model = theory.recall(vocabulary=30, ngram=ngram, length=LONGEST, placement=placement)
    margin = 1.0 if placement == "logits" else theory.ngram_margin(0.5 ** torch.arange(ngram))
    c = theory.temperature(margin, LONGEST, 1e-3)
    for length in (16, LONGEST):
        examples = draw(task, length, count=4)
        assert accuracy(model, task, length, count=4) == 1
        assert max_error(model, examples) <= theory.error_bound(margin, length, c) + 4e-6  # the rounding of float32


@pytest.mark.parametrize("placement", COPYING)
@pytest.mark.parametrize(("signals", "alphabet"), [(1, 1), (4, 9)])
def test_one_layer_copies_with_a_long_kernel_on_queries_or_keys(placement, signals, alphabet):
    model = theory.copying(alphabet=alphabet, noise=7, length=LONGEST, placement=placement)
    margin = theory.copying_margin(LONGEST)
    bound = theory.error_bound(margin, LONGEST, theory.temperature(margin, LONGEST, 1e-3))
    for length in (64, LONGEST):
        task = copying_task(signals, alphabet)
        assert accuracy(model, task, length, count=4) == 1
        assert max_error(model, draw(task, length, count=4)) <= bound
    middle = [2 + token for token in range(alphabet)][:signals]
    tokens = [BOS, *[2 + alphabet] * 500, *middle, *[2 + alphabet] * 500, 1, *middle]
    assert model(torch.tensor([tokens]))[0, -1].argmax() == 1, "the separator ends the copy"


@pytest.mark.parametrize(("placement", "ngram"), [(place, most + 1) for place, most in RECALL.items()] + [("q", 1)])
def test_a_placement_without_a_construction_is_refused(placement, ngram):
    with pytest.raises(ValueError, match=f"placement = {placement} solves recall of ngram = {ngram}"):
        theory.recall(vocabulary=5, ngram=ngram, length=16, placement=placement)


# Places that cannot solve a task.


def with_random_weights(seed: int, *, vocabulary: int = 7, **settings: object) -> SequenceModel:
    """One layer with large random projections, embeddings and kernels."""
    defaults = {"mixer": "attention", "width": 16, "layers": 1, "heads": 2}
    model = build_model(model_config(**defaults | settings), vocabulary=vocabulary, length=16, seed=seed).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name:
                weight.copy_(torch.randn(weight.shape, generator=generator, dtype=torch.float64) * 0.7)
    return model


@torch.no_grad()
def last_logits(model: SequenceModel, *contexts: tuple[int, ...]) -> torch.Tensor:
    return model(torch.tensor(contexts))[:, -1]


def pair(*tokens: int) -> tuple[int, ...]:
    return (*tokens, *GAP)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"conv_q": 4},
        {"conv_q": 4, **CHANNEL},
        {"canon": "C", **MLP},
        {"canon": "D", **MLP},
        {"canon": "CD", **MLP},
        {"canon": "CD", **MLP, "conv_q": 4},
    ],
)
def test_without_a_convolution_before_the_scores_of_keys_a_context_is_a_set(settings):
    """Queries and the MLP see only the last tokens in order, so what follows u is lost."""
    contexts = (BOS, *pair(U, A), *pair(V, B), U), (BOS, *pair(U, B), *pair(V, A), U)
    first, second = last_logits(with_random_weights(0, **settings), *contexts)
    torch.testing.assert_close(first, second)
    assert last_logits(theory.recall(vocabulary=7, ngram=1, length=32, placement="k"), *contexts).argmax(-1).tolist() == [A, B]


@pytest.mark.parametrize(
    "settings",
    [
        {"token_shift": True},
        {"conv_k": 2, "conv_v": 2},
        {"conv_q": 2, "conv_k": 2, "conv_v": 2, **CHANNEL},
        {"canon": "A", "canon_size": 2},
        {"canon": "B", "canon_size": 2},
    ],
)
def test_kernels_of_n_values_see_no_key_together_with_its_answer(settings):
    """N tokens at a time, with N = 2: the contexts have the same windows, only in another order."""
    contexts = (BOS, *pair(T, U, A), *pair(V, U, B), T, U), (BOS, *pair(T, U, B), *pair(V, U, A), T, U)
    first, second = last_logits(with_random_weights(0, **settings), *contexts)
    torch.testing.assert_close(first, second)
    assert last_logits(theory.recall(vocabulary=7, ngram=2, length=32), *contexts).argmax(-1).tolist() == [A, B]


def solves_all(model: SequenceModel, contexts: list[tuple[tuple[int, ...], int]]) -> bool:
    logits = last_logits(model, *(context for context, _ in contexts))[:, [A, B]]
    return (logits.argmax(-1) == torch.tensor([answer == B for _, answer in contexts])).all().item()


ENDINGS = [
    ((BOS, *pair(T, U, first), *pair(V, U, second), *GAP, ending, U), first if ending == T else second)
    for first, second in ((A, B), (B, A))
    for ending in (T, V)
]
"""2-gram recall, where the last token is the same in all contexts."""


@pytest.mark.parametrize("settings", [{"conv_k": 4}, {"conv_v": 4}, {"conv_k": 4, "conv_v": 4, **CHANNEL}])
def test_a_query_of_one_token_recalls_no_n_gram(settings):
    """The softmax before its division is a sum of a part of the pairs and a part of the ending; the answer is their XOR."""
    assert not any(solves_all(with_random_weights(seed, heads=1, **settings), ENDINGS) for seed in range(100))
    assert solves_all(theory.recall(vocabulary=7, ngram=2, length=64), ENDINGS)


KEY_PAIRS = [
    ((BOS, *pair(key, first), *pair(other, second), *GAP, query), first if query == key else second)
    for key, other in ((U, V), (U, T), (V, T))
    for first, second in ((A, B), (B, A))
    for query in (key, other)
]


@pytest.mark.parametrize("settings", [{"conv_v": 4}, {"conv_v": 4, **CHANNEL}])
def test_a_convolution_of_values_alone_recalls_nothing(settings):
    """Of two keys, one must weigh a more than b and the other b more than a. No three keys do so pairwise."""
    assert not any(solves_all(with_random_weights(seed, heads=1, **settings), KEY_PAIRS) for seed in range(100))
    assert solves_all(theory.recall(vocabulary=7, ngram=1, length=64, placement="k"), KEY_PAIRS)


def test_one_kernel_for_the_input_of_queries_and_keys_confuses_two_tokens():
    """With W_q W_k = c I, the token before the query matches itself as well as the query matches the token before the answer."""
    context, answer, before = torch.tensor([[BOS, U, A, 7, 8, 9, V, 10, 11, 12, V, U]]), 2, 6
    for seed in range(5):
        model = with_random_weights(seed, vocabulary=13, heads=1, canon="A")
        (block,) = model.layers()
        with torch.no_grad():
            block.canon["A"].kernel.copy_(block.canon["A"].kernel[:1].clone().expand(16, -1))
            for linear in (block.mixer.q_proj, block.mixer.k_proj):
                linear.weight.copy_(torch.eye(16))
            x = block.canon["A"](torch.eye(13, 16, dtype=torch.float64)[context])
            q, k, _ = block.mixer.prepare(block.mixer.project(x))
        scores = (q @ k.mT)[0, 0, -1]
        torch.testing.assert_close(scores[answer], scores[before])


SHORT = [
    {"conv_q": 4, "conv_k": 4, "conv_v": 4, **CHANNEL},
    {"canon": "ABCD", **MLP},
    {"token_shift": True},
    {"mixer": "multi_token"},
]


@pytest.mark.parametrize("settings", SHORT)
def test_short_kernels_do_not_see_the_order_of_distant_signals(settings):
    """Each signal stands among noise, so an exchange of two signals changes no window."""
    first, second, noise = 2, 3, (6,) * 16
    contexts = [(BOS, *noise, x, *noise, y, *noise, 1) for x, y in ((first, second), (second, first))]
    model = with_random_weights(0, **settings)
    torch.testing.assert_close(*last_logits(model, *contexts))
    for placement in COPYING:
        solved = theory.copying(alphabet=2, noise=3, length=64, placement=placement)
        assert last_logits(solved, *contexts).argmax(-1).tolist() == [first, second]
