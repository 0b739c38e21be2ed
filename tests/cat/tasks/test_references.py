"""Partial strategies on sequences made by hand; the expected probabilities are computed by hand or by counting in Python."""

from collections import Counter, defaultdict

import numpy as np
import pytest

from cat.tasks.base import IGNORE, Examples, GeneratedData, Windows, guess_probability
from cat.tasks.compressors import COMPRESSORS
from cat.tasks.copying import Copying
from cat.tasks.encoded import tokenizer_of
from cat.tasks.recall import Recall
from cat.tasks.registry import KINDS, generator
from cat.tasks.text import Text
from cat.tasks.tokenizer import Bytes
from cat.tasks.witten_bell import CHUNK_TOKENS, _target_positions, ngram_bits

SIZES = {"length": 40, "multiples": (1,), "train_examples": 7, "valid_examples": 5, "test_examples": 3}


def recall(ngram, keys):
    """Keys are the tokens 1 .. keys, other tokens up to 98 are values, and 99 is a blank."""
    settings = {
        "ngram": ngram,
        "keys": keys,
        "values": 98 - keys,
        "filler": 1,
        "pairs": 2,
        "queries": "all",
        "query_gap": "uniform",
    }
    return Recall(kind="recall", **SIZES, **settings)


def copying(unique):
    return Copying(kind="copying", **SIZES, signals=3, alphabet=5, noise=2, unique=unique)


def sequence(pairs, queries):
    """One sequence: keys with their values, then (key, answer), each key followed by a blank."""
    inputs, targets = [0], [IGNORE]
    for key, value in pairs:
        inputs += [*key, value]
        targets += [IGNORE] * (len(key) + 1)
    for key, answer in queries:
        inputs += [*key, 99]
        targets += [IGNORE] * (len(key) - 1) + [answer, IGNORE]
    return inputs, targets


def probabilities(task, name, *sequences):
    """Of each answer, sequence by sequence."""
    inputs, targets = (np.array(column) for column in zip(*sequences, strict=True))
    found = getattr(task, name)(Examples(inputs, targets))
    assert found.shape == inputs.shape
    return [row[target != IGNORE].tolist() for row, target in zip(found, targets, strict=True)]


def test_a_guessed_value_is_the_most_frequent_of_its_sequence():
    first = sequence([((1,), 50), ((2,), 50), ((3,), 60)], [((3,), 60), ((2,), 50)])
    second = sequence([((1,), 60), ((2,), 61), ((3,), 62)], [((1,), 60), ((3,), 62)])
    task = recall(1, 3)
    assert task.reference_names == ("guess_value",)
    assert probabilities(task, "guess_value", first, second) == [[0, 1], [1 / 3, 1 / 3]]


def test_strategies_that_know_a_part_of_two_key_tokens():
    one = sequence([((1, 2), 50), ((2, 2), 51), ((2, 1), 52)], [((1, 2), 50), ((2, 1), 52), ((2, 2), 51)])
    task = recall(2, 2)
    assert task.reference_names == ("guess_value", "last_key_token", "key_token_set")
    assert probabilities(task, "last_key_token", one) == [[1 / 2, 1, 1 / 2]]
    assert probabilities(task, "key_token_set", one) == [[1 / 2, 1 / 2, 1]]
    assert probabilities(task, "guess_value", one) == [[1 / 3, 1 / 3, 1 / 3]]
    assert task.reference_labels["last_key_token"] == "find one of two key tokens, the last"


def test_strategies_that_know_a_part_of_three_key_tokens():
    pairs = [((1, 1, 2), 50), ((2, 1, 2), 51), ((2, 2, 2), 51), ((1, 2, 1), 53)]
    one = sequence(pairs, [((1, 1, 2), 50), ((2, 2, 2), 51), ((1, 2, 1), 53)])
    task = recall(3, 2)
    assert task.reference_names == ("guess_value", "last_key_token", "last_two_key_tokens", "key_token_set")
    assert probabilities(task, "last_key_token", one) == [[0, 1, 1]], "51 is twice among the values of keys that end in 2"
    assert probabilities(task, "last_two_key_tokens", one) == [[1 / 2, 1, 1]]
    assert probabilities(task, "key_token_set", one) == [[1 / 2, 1, 1 / 2]], "as often, in any order"


def test_guesses_of_signals():
    """BOS, signals 2 .. 6 among noise 7 and 8, the separator, then the signals."""
    repeated = ([0, 7, 2, 3, 8, 2, 1, 2, 3], [*[IGNORE] * 6, 2, 3, 2])
    different = ([0, 7, 2, 3, 8, 4, 1, 2, 3], [*[IGNORE] * 6, 2, 3, 4])
    task = copying(False)
    assert probabilities(task, "any_signal", repeated, different) == [[1, 0, 1], [1 / 3] * 3]
    assert probabilities(task, "any_uncopied", repeated, different) == [[1, 1 / 2, 1], [1 / 3, 1 / 2, 1]]


def test_a_question_without_a_candidate_is_not_answered():
    known, asked = np.array([[0, 1], [1, 1]]), np.array([[0, 1], [0, 2]])
    assert guess_probability(known, np.array([5, 6]), asked, np.array([5, 5])).tolist() == [1, 0]


def test_the_score_is_the_mean_over_the_answers_of_each_length():
    first = sequence([((1,), 50), ((2,), 50), ((3,), 60)], [((3,), 60), ((2,), 50)])
    longer = sequence([((1,), 60), ((2,), 61), ((3,), 62)], [((1,), 60), ((3,), 62)])
    tests = {9: Examples(*np.array(first)[:, None]), 18: Examples(*np.array(longer)[:, None])}
    scores = recall(1, 3).score_references(GeneratedData(tests, [tests[9]], 100))
    assert scores == {"guess_value": {9: 1 / 2, 18: pytest.approx(1 / 3)}}


@pytest.mark.parametrize("kind", KINDS)
def test_every_task_has_an_oracle_or_says_that_it_has_none_and_scores_its_strategies(kind):
    """A task's `example` has the settings that its class adds to those of all tasks."""
    task = KINDS[kind](kind=kind, **SIZES, **KINDS[kind].example)
    tests = {length: task.examples("test", length, 3, generator(0, kind, f"test_{length}")) for length in task.lengths}
    training = task.training(task.length, generator(0, kind, "train"))
    scores = task.score_references(GeneratedData(tests, [training], task.vocabulary, task.extents(), Bytes()))
    assert (task.oracle(tests[40]) is None) == (task.goal == "loss"), "the past of a text does not determine what follows"
    assert tuple(scores) == task.reference_names != ()
    for name, label in task.reference_labels.items():
        assert label
        assert "\n" not in label
        assert set(scores[name]) == {40}
        assert name in COMPRESSORS or 0 < scores[name][40] <= (1 if task.goal == "accuracy" else 8)
        assert task.goal == "loss" or getattr(task, name).__doc__


def bits_by_counting(text, positions, asked, vocabulary):
    """Witten-Bell bits of the last token of each of `asked`, one n-gram and one context at a time."""
    n = len(asked[0])
    follow = [defaultdict(Counter) for _ in range(n)]
    for position in positions:
        for order in range(min(n, position + 1)):
            follow[order][tuple(text[position - order : position])][text[position]] += 1
    rows = []
    for *context, answer in asked:
        probability, row = 1 / vocabulary, []
        for order in range(n):
            counts = follow[order][tuple(context[len(context) - order :])]
            if counts:
                probability = (counts[answer] + len(counts) * probability) / (counts.total() + len(counts))
            row.append(-np.log2(probability))
        rows.append(row)
    return rows


def test_a_bigram_table_by_hand():
    """The targets of 0 1 0 1 1 are 1, 0, 1, 1: p(1) = 4/6, p(1 | 0) = (2 + 4/6) / 3, p(0 | 1) = (1 + 2 * 2/6) / 4."""
    windows = Windows(np.array([0, 1, 0, 1, 1], dtype=np.uint8), np.array([0]), 4)
    bits = ngram_bits([windows], np.array([[0, 1], [1, 0]]), 2)
    np.testing.assert_allclose(2**-bits, [[4 / 6, 8 / 9], [2 / 6, 5 / 12]])


@pytest.mark.parametrize("chunk", [7, CHUNK_TOKENS])
def test_tables_of_ngrams_agree_with_counting(chunk, monkeypatch):
    monkeypatch.setattr("cat.tasks.witten_bell.CHUNK_TOKENS", chunk)
    text = np.random.Generator(np.random.PCG64(0)).integers(0, 5, size=211, dtype=np.uint8)
    starts = np.array([101, 0, 3, 3, 140, 104])
    windows = [Windows(text, starts, 13), Windows(text, starts[:2] + 1, 5)]  # of two lengths
    positions = {start + offset for start in starts.tolist() for offset in range(1, 14)}
    positions = sorted(positions | {start + offset for start in (starts[:2] + 1).tolist() for offset in range(1, 6)})
    assert np.concatenate(list(_target_positions(windows))).tolist() == positions
    asked = np.concatenate([np.lib.stride_tricks.sliding_window_view(text[150:], 5), [[4, 4, 4, 4, 4], [6, 6, 6, 6, 6]]])
    bits = ngram_bits(windows, asked.astype(np.int64), 7)
    np.testing.assert_allclose(bits, bits_by_counting(text.tolist(), positions, asked.tolist(), 7))


@pytest.mark.parametrize("tokens", [{}, {"tokens": "words", "vocabulary_size": 5}])
def test_text_is_scored_on_the_targets_of_the_models_in_bits_per_byte(tokens, tmp_path):
    letters = generator(0, "text", "train").choice([*b"ab   \n"], size=3001).astype(np.uint8)
    (tmp_path / "one.txt").write_bytes(letters.tobytes())
    settings = {**SIZES, "length": 12, "multiples": (0.5, 1, 2)}
    task = Text(kind="text", source=str(tmp_path / "one.txt"), **tokens, **settings)
    training = task.training(task.length, generator(0, "text", "train"))
    tests = {length: task.examples("test", length, 3, generator(0, "text", "test")) for length in task.lengths}
    extents = task.extents()
    assert tokens == {} or extents.unknown.sum() > 0
    scores = task.score_references(GeneratedData(tests, [training], task.vocabulary, extents, tokenizer_of(task)))
    positions = sorted({start + offset for start in training.starts.tolist() for offset in range(1, 13)})
    rows = [[*row, last] for row, last in zip(tests[24].inputs.tolist(), tests[24].targets[:, -1].tolist(), strict=True)]
    asked = [row[end - 5 : end] for row in rows for end in range(len(row) - 11, len(row) + 1)]
    bits = np.sum(bits_by_counting(training.tokens.tolist(), positions, asked, task.vocabulary), axis=0)
    expected = (bits[1:] + 8 * extents.unknown.sum()) / extents.bytes.sum()
    assert list(scores) == ["bigram", "trigram", "fourgram", "fivegram", *COMPRESSORS]
    for values, value in zip(scores.values(), expected, strict=False):
        assert values == dict.fromkeys(task.lengths, pytest.approx(value))


def test_tables_need_their_context_before_the_first_target():
    settings = {**SIZES, "length": 4, "multiples": (1, 2)}
    assert Text(kind="text", source="python-docs", **settings).reference_names == ("bigram", "trigram", "fourgram", *COMPRESSORS)
