"""Needles in text: a solver in plain Python finds the only answer of every query, and the text is that of the split."""

import hashlib
import re

import numpy as np
import pytest
from pydantic import ValidationError

from cat.tasks import needles as needles_module
from cat.tasks.corpus import corpus
from cat.tasks.encoded import tokens_of
from cat.tasks.needles import Needles
from cat.tasks.ngrams import occurs_elsewhere, pack
from cat.tasks.registry import IGNORE, Examples, generator

SIZES = {"length": 61, "multiples": (1, 2.5), "train_examples": 23, "valid_examples": 11, "test_examples": 13}
MARK, ASK = 256, 257


def words(count, seed):
    """Text of `count` bytes over 29 made-up words, the first ones more frequent."""
    random = np.random.Generator(np.random.PCG64(seed))
    lexicon = ["".join(map(chr, random.integers(97, 115, size=size))) for size in random.integers(1, 6, size=29)]
    drawn = random.integers(0, 29, size=count) * random.integers(0, 29, size=count) // 29
    return " ".join(lexicon[word] for word in drawn).encode()[:count]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "one.txt"
    path.write_bytes(words(20011, 0))
    return path


def needles(source, **changes):
    default = {"needles": 3, "queries": 2, "ngram": 2, "values": 5}
    return Needles(**{"kind": "needles", "source": str(source), **SIZES, **default, **changes})


def splits(task, seed=0):
    sizes = {"train": (task.length, task.train_examples), "valid": (task.length, task.valid_examples)}
    for name, (length, count) in sizes.items():
        yield name, task.examples(name, length, count, generator(seed, "task", name))
    for length in task.lengths:
        yield "test", task.examples("test", length, task.test_examples, generator(seed, "task", f"test_{length}"))


def taken_apart(tokens, mark, ask, n):
    """(text, facts, queries): facts are (key, value, tokens of text before); queries are (key, position of its last token)."""
    text, facts, queries, position = [], [], [], 0
    while position < len(tokens):
        key = tuple(tokens[position + 1 : position + 1 + n])
        if tokens[position] == mark:
            facts.append((key, tokens[position + 1 + n], len(text)))
            position += n + 2
        elif tokens[position] == ask:
            queries.append((key, position + n))
            position += n + 1
        else:
            assert not queries, "text after a query"
            text.append(tokens[position])
            position += 1
    return text, facts, queries


CASES = {
    "two tokens": {},
    "one token": {"ngram": 1},
    "three tokens": {"ngram": 3, "values": 7},
    "many": {"needles": 6, "queries": 3, "scale_needles": True, "values": 8},
    "alike": {"needles": 5, "shared_endings": True},
    "at one depth": {"test_depth": 40, "queries": 1},
    "as many as fit": {"needles": 10, "queries": 2, "multiples": (1,), "length": 66, "values": 8},
    "words": {"tokens": "words", "vocabulary_size": 31},
    "pieces": {"tokens": "bpe", "vocabulary_size": 271, "values": 9},
}


@pytest.mark.parametrize("chunk", [200, needles_module.CHUNK_TOKENS])
@pytest.mark.parametrize("case", CASES)
def test_every_query_has_one_answer_which_only_its_needle_gives(case, chunk, file, monkeypatch):
    monkeypatch.setattr(needles_module, "CHUNK_TOKENS", chunk)
    task = needles(file, **CASES[case])
    n, mark, ask = task.ngram, task.vocabulary - 2, task.vocabulary - 1
    counts = np.bincount(tokens_of(task, "train"))
    for split, (inputs, targets) in splits(task):
        length = inputs.shape[1]
        for tokens, target in zip(inputs.tolist(), targets.tolist(), strict=True):
            text, facts, queries = taken_apart(tokens, mark, ask, n)
            assert len(queries) == task.queries == len({key for key, _ in queries})
            assert len(facts) == task.needles_at(length) == len({key for key, _, _ in facts}), "keys are distinct"
            assert "".join(map(chr, text)) in "".join(map(chr, tokens_of(task, split))), "whole, and of its split"
            answers = {end: value for key, end in queries for marked, value, _ in facts if marked == key}
            assert {i: value for i, value in enumerate(target) if value != IGNORE} == answers
            assert len(answers) == task.queries
            value_of = {key: value for key, value, _ in facts}
            unmarked = dict.fromkeys(value_of, 0)
            for start in range(length - n + 1):
                key = tuple(tokens[start : start + n])
                if key in value_of and (start == 0 or tokens[start - 1] not in (mark, ask)):
                    unmarked[key] += 1
                    assert value_of[key] not in (tokens[start - 1 : start] + tokens[start + n : start + n + 1])
            assert all(unmarked.values()), "each key occurs without the marker, too"
            assert all((counts > counts[value]).sum() < task.values for value in value_of.values()), "a frequent token"


@pytest.mark.parametrize("case", CASES)
def test_the_oracle_and_the_answer_positions_find_the_targets(case, file):
    task = needles(file, **CASES[case])
    for _, examples in splits(task):
        inputs, targets = examples
        np.testing.assert_array_equal(task.oracle(Examples(inputs, np.full_like(targets, IGNORE))), targets)
        for stored in (examples, examples.compact()):
            positions = task.answer_positions(stored)
            is_target = targets != IGNORE
            assert (positions[~is_target] == -1).all()
            rows, _ = np.nonzero(is_target)
            np.testing.assert_array_equal(inputs[rows, positions[is_target]], targets[is_target])
            assert (inputs[rows, positions[is_target] - task.ngram - 1] == task.mark).all()


def depths(task, split, count, length=61):
    """Tokens of text before each asked needle, as a share of the text, N x queries."""
    inputs, _ = task.examples(split, length, count, generator(0, "task", split))
    shares = []
    for tokens in inputs.tolist():
        text, facts, queries = taken_apart(tokens, MARK, ASK, task.ngram)
        before = {key: count for key, _, count in facts}
        shares.append([before[key] / len(text) for key, _ in queries])
    return np.array(shares)


def test_needles_stand_at_any_depth(file):
    """A uniform share in [0, 1] has mean 1/2 and standard deviation .29; 800 of them do not depend on the query."""
    found = depths(needles(file), "train", 400)
    assert abs(found.mean() - 1 / 2) < 5 * 0.29 / np.sqrt(800)
    assert abs(found.std() - 0.29) < 0.03
    assert (found.min(), found.max()) == (0, 1)
    assert abs(np.corrcoef(found.T)[0, 1]) < 0.2


@pytest.mark.parametrize("depth", [0, 25.0, 100])
def test_asked_needles_of_test_sequences_stand_at_the_depth(depth, file):
    task = needles(file, test_depth=depth, queries=1)
    text = task.text_at(61)
    assert (np.abs(depths(task, "test", 53) - depth / 100) < 3 / text).all()
    assert depths(task, "train", 53).std() > 0.2, "training sequences have needles anywhere"


def test_the_text_of_test_sequences_can_be_of_another_source(file, tmp_path):
    other = tmp_path / "other.txt"
    other.write_bytes(words(9001, 1))
    task = needles(file, test_source=str(other))
    found = dict(splits(task))
    for split, source in {"train": file, "valid": file, "test": other}.items():
        for tokens in found[split].inputs.tolist():
            text, _, _ = taken_apart(tokens, MARK, ASK, 2)
            assert bytes(text) in bytes(corpus(str(source))[split])
    assert set(task.origin()) == {"one.txt", "other.txt"}
    assert [line.partition(":")[0] for line in task.report()] == [str(file), str(other)]


def test_shared_endings_hide_the_key_from_its_last_token(file):
    shares = {}
    for shared in (False, True):
        task = needles(file, needles=4, queries=4, shared_endings=shared, length=128)
        examples = task.examples("train", 128, 200, generator(0, "task", "train"))
        shares[shared] = task.last_key_token(examples)[examples.targets >= 0].mean()
        is_alone = [
            len(endings) - len(set(endings))
            for tokens in examples.inputs.tolist()
            for endings in [[key[-1] for key, _, _ in taken_apart(tokens, MARK, ASK, 2)[1]]]
        ]
        if shared:
            assert min(is_alone) >= 2, "two of four endings repeat others"
    assert shares[True] < 0.6 < shares[False]


def by_hand(*tokens):
    """The tokens of a sequence, one or two letters at a time, `>` for MARK and `?` for ASK."""
    special = {">": MARK, "?": ASK}
    return [special.get(letter, ord(letter)) for letter in "".join(tokens)]


def test_partial_strategies_by_hand():
    """Keys ab, cb and de; ab also occurs twice without the marker, and de once."""
    tokens = by_hand("abx", ">abV", "abde", ">cbW", "z", ">deV", "?cb", "?ab", "?de")
    targets = [IGNORE] * len(tokens)
    for end, value in zip((-7, -4, -1), "WVV", strict=True):
        targets[end] = ord(value)
    examples = Examples(np.array([tokens]), np.array([targets]))
    task = needles("python-docs", needles=3, queries=3)
    np.testing.assert_array_equal(task.oracle(examples), examples.targets)
    found = {name: getattr(task, name)(examples)[examples.targets >= 0].tolist() for name in task.reference_names}
    assert found == {
        "guess_value": [0, 1, 1],
        "last_value": [0, 1, 1],
        "any_occurrence": [1, 1 / 3, 1 / 2],
        "last_key_token": [1 / 2, 1 / 2, 1],
    }
    assert needles("python-docs", ngram=1).reference_names == ("guess_value", "last_value", "any_occurrence")


def test_examples_are_a_function_of_the_generator(file):
    first, again, other = (
        [array.tolist() for _, examples in splits(needles(file), seed) for array in examples] for seed in (0, 0, 1)
    )
    assert first == again != other


@pytest.mark.parametrize(
    ("changes", "digest"),
    [
        ({}, "9ec3219fe9208d56"),
        ({"shared_endings": True, "ngram": 3}, "5d6eea51fc5f0d8b"),
        ({"test_depth": 70, "scale_needles": True}, "de30f7e0b73fc856"),
    ],
)
def test_the_first_examples_are_the_same_on_every_machine(changes, digest, file):
    drawn = [examples for _, examples in splits(needles(file, **changes))]
    found = hashlib.sha256(b"".join(array.astype("<i8").tobytes() for examples in drawn for array in examples))
    assert found.hexdigest()[:16] == digest


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"queries": 4}, "length 61 has 3 needles, fewer than queries = 4"),
        ({"scale_needles": True, "multiples": (0.5, 1)}, "length 30 has 1 needles, fewer than queries = 2"),
        ({"needles": 10}, "length 61 is too short for 10 needles and 2 queries, which need 66 tokens"),
        ({"length": 23}, "length 23 is too short for 3 needles and 2 queries, which need 24 tokens"),
        ({"ngram": 8}, "ngram = 8 is too long: 9 tokens from a vocabulary of 258 do not fit in 64 bits"),
        ({"ngram": 1, "shared_endings": True}, "shared_endings = true needs ngram = 2 or more, but ngram = 1"),
        ({"tokens": "bpe"}, "tokens = bpe needs vocabulary_size"),
        ({"folder": "x"}, "folder needs source = wikitext-103"),
    ],
)
def test_a_configuration_that_breaks_a_rule_is_refused(changes, message):
    with pytest.raises(ValidationError) as error:
        needles("python-docs", **changes)
    (found,) = error.value.errors()
    assert str(found["ctx"]["error"]).startswith(message)


def test_the_folder_of_wikitext_may_serve_the_test_source_only():
    assert needles("python-docs", test_source="wikitext-103", folder="x").sources == ("python-docs", "wikitext-103")


@pytest.mark.parametrize(
    ("text", "changes", "message"),
    [
        (words(400, 0), {}, "the valid split of {path} has 40 tokens, too few for the 43 of a sequence of length 61"),
        (b"ab" * 3000, {}, "the train split of {path} is too repetitive for 3 needles with 2 values in sequences of length 61."),
        (words(9001, 0), {"values": 50}, "values = 50 exceeds the 19 different tokens in the train split of {path}"),
    ],
)
def test_a_text_without_room_is_refused_in_one_line(text, changes, message, tmp_path):
    path = tmp_path / "bad.txt"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=re.escape(message.format(path=path))) as error:
        list(splits(needles(path, **{"values": 2, **changes})))
    assert "\n" not in str(error.value)


def test_occurrences_elsewhere_agree_with_a_loop():
    random = np.random.Generator(np.random.PCG64(0))
    packed = pack(random.integers(0, 4, size=(7, 41), dtype=np.uint8), 2, 4)
    starts = np.array([np.unique(row, return_index=True)[1][:5] for row in packed])
    row, position, number = occurs_elsewhere(packed, starts)
    expected = {
        (i, j, k)
        for i in range(7)
        for j in range(40)
        for k in range(5)
        if packed[i, j] == packed[i, starts[i, k]] and j != starts[i, k]
    }
    assert set(zip(row.tolist(), position.tolist(), number.tolist(), strict=True)) == expected
    assert len(row) == len(expected)
