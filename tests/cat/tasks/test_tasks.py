"""The tasks: an oracle finds the one answer of every question; the examples are a pure function of what they are made from."""

import hashlib
import itertools
import random
import re
import sysconfig
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from cat.tasks.base import draw_distinct
from cat.tasks.corpus import corpus
from cat.tasks.registry import IGNORE, Copying, Examples, Recall, Text, generator
from tests.helpers.oracles import answers, next_tokens

SIZES = {"length": 29, "multiples": (0.5, 1, 2, 5), "train": 7, "valid": 5, "test": 3}
LENGTHS = (14, 29, 58, 145)
# Keys for each N, and the pairs at each length: in proportion, but no more than the 11, 9 and 8 N-grams that there are.
KEYS = {1: 11, 2: 3, 3: 2}
PAIRS = {1: (1, 3, 6, 11), 2: (1, 3, 6, 9), 3: (1, 3, 6, 8)}


def recall(**changes):
    default = {"ngram": 1, "keys": 11, "values": 13, "filler": 5, "pairs": 3, "questions": "all", "gaps": "uniform"}
    return Recall(**{"kind": "recall", **SIZES, **default, **changes})


def copying(**changes):
    default = {"signals": 5, "alphabet": 7, "noise": 3, "unique": True}
    return Copying(**{"kind": "copying", **SIZES, **default, **changes})


def text(source, **changes):
    return Text(**{"kind": "text", "source": str(source), **SIZES, **changes})


RECALL = [
    pytest.param(
        recall(ngram=n, keys=KEYS[n], questions=questions, gaps=gaps, filler=filler), id=f"{n}-{questions}-{gaps}-{filler}"
    )
    for n, questions, gaps, filler in itertools.product((1, 2, 3), ("one", "all"), ("uniform", "power"), (1, 5))
]
COPYING = [pytest.param(copying(unique=unique), id="unique" if unique else "repeated") for unique in (True, False)]


def splits(task, seed=0):
    """Every split of a task by its name, drawn as the study draws it."""
    sizes = {"train": ("train", task.length, task.train), "valid": ("valid", task.length, task.valid)}
    sizes |= {f"test_{length}": ("test", length, task.test) for length in task.lengths}
    return {name: task.examples(*size, generator(seed, "task", name)) for name, size in sizes.items()}


def many(task, count=500, length=29, seed=0):
    return task.examples("train", length, count, generator(seed, "task", "train"))


def questions(examples):
    """Row and position of every question, row by row."""
    return np.argwhere(examples.targets != IGNORE)


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("task", RECALL + COPYING)
def test_the_oracle_finds_every_answer_and_no_question_besides(task):
    assert task.lengths == LENGTHS
    for name, (inputs, targets) in splits(task).items():
        count, length = {"train": (7, 29), "valid": (5, 29)}.get(name) or (3, int(name.removeprefix("test_")))
        assert inputs.shape == targets.shape == (count, length)
        np.testing.assert_array_equal(answers(task, inputs), targets, err_msg=name)


@pytest.mark.parametrize("task", RECALL)
def test_the_key_of_a_question_occurs_once_before_it(task):
    n = task.ngram
    for examples in splits(task).values():
        windows = np.lib.stride_tricks.sliding_window_view(examples.inputs, n, axis=1)
        for row, t in questions(examples):
            here = (windows[row, : t + 2 - n] == windows[row, t + 1 - n]).all(axis=-1)
            assert here[-1]
            assert here[:-1].sum() == 1


@pytest.mark.parametrize("task", RECALL)
def test_a_recall_sequence_holds_the_pairs_and_questions_of_its_length(task):
    for length, pairs in zip(LENGTHS, PAIRS[task.ngram], strict=True):
        inputs, targets = task.examples("test", length, 3, generator(0, "task", "test"))
        asked = (targets != IGNORE).sum(axis=1)
        assert task.pairs_at(length) == pairs
        assert set(asked) == {pairs if task.questions == "all" else 1}
        is_key, is_value = (inputs >= 1) & (inputs <= task.keys), (task.keys < inputs) & (inputs <= task.keys + task.values)
        assert set(is_value.sum(axis=1)) == {pairs}
        np.testing.assert_array_equal(is_key.sum(axis=1), task.ngram * (pairs + asked))
        if task.questions == "one":
            assert (targets[:, -1] != IGNORE).all()
        else:
            slot = task.ngram + 1
            np.testing.assert_array_equal(np.flatnonzero(is_value.any(axis=0)), slot * np.arange(1, pairs + 1))


@pytest.mark.parametrize("task", RECALL)
def test_tokens_of_recall_by_role(task):
    """BOS first and nowhere else, then keys, values and filler, each in a range of its own and using the whole of it."""
    assert task.vocabulary == 1 + task.keys + task.values + task.filler
    inputs, targets = examples = many(task)
    assert (inputs[:, 0] == 0).all()
    key_tokens, values, filler = np.split(np.arange(1, task.vocabulary), [task.keys, task.keys + task.values])
    row, t = questions(examples).T
    keys = inputs[row[:, None], t[:, None] - np.arange(task.ngram)]
    np.testing.assert_array_equal(np.unique(keys), key_tokens)
    np.testing.assert_array_equal(np.unique(targets[row, t]), values)
    np.testing.assert_array_equal(np.unique(inputs[:, 1:]), np.concatenate([key_tokens, values, filler]))


@pytest.mark.parametrize("task", COPYING)
def test_tokens_of_copying_by_role(task):
    assert task.vocabulary == 2 + task.alphabet + task.noise
    for length in LENGTHS:
        inputs, targets = many(task, length=length)
        separator = length - task.signals
        context, asked = inputs[:, 1:separator], targets[:, separator:]
        is_signal = (context >= 2) & (context < 2 + task.alphabet)
        assert (inputs[:, 0] == 0).all()
        assert (inputs[:, separator] == 1).all()
        assert set(is_signal.sum(axis=1)) == {task.signals} == {(row != IGNORE).sum() for row in targets}
        assert is_signal.any(axis=0).all(), "a place where no signal ever stands"
        np.testing.assert_array_equal(np.unique(context[is_signal]), np.arange(2, 2 + task.alphabet))
        np.testing.assert_array_equal(np.unique(context[~is_signal]), np.arange(2 + task.alphabet, task.vocabulary))
        np.testing.assert_array_equal(inputs[:, separator + 1 :], asked[:, :-1])
        distinct = {len(set(row)) for row in asked.tolist()}
        assert distinct == {task.signals} if task.unique else min(distinct) < task.signals


def unigram_accuracy(task):
    """The mean score of a solver that knows a key by its last token alone, and guesses among the values it has seen behind it."""
    inputs, targets = examples = many(task, length=task.length)
    scores = []
    for row, t in questions(examples):
        before, after = inputs[row, :t], inputs[row, 1 : t + 1]
        guesses = after[(before == inputs[row, t]) & (after > task.keys) & (after <= task.keys + task.values)]
        scores.append((guesses == targets[row, t]).mean())
    return np.mean(scores)


@pytest.mark.parametrize("questions", ["one", "all"])
def test_the_last_token_of_a_key_from_a_small_alphabet_does_not_give_it_away(questions):
    sizes = {"length": 53, "multiples": (1,), "questions": questions, "values": 31}
    assert unigram_accuracy(recall(**sizes, ngram=1, keys=31, pairs=8)) == 1
    assert unigram_accuracy(recall(**sizes, ngram=2, keys=31, pairs=4)) > 0.9, "the trap"
    assert unigram_accuracy(recall(**sizes, ngram=2, keys=4, pairs=8)) < 0.6
    assert unigram_accuracy(recall(**sizes, ngram=3, keys=2, pairs=6)) < 0.5


def question_gaps(task, count=4001):
    """How far each question is from its key, in the slots of a pair."""
    n, slot = task.ngram, task.ngram + 1
    examples = many(task, count, task.length)
    row, t = questions(examples).T
    windows = np.lib.stride_tricks.sliding_window_view(examples.inputs, n, axis=1)[row]
    is_key = (windows == np.take_along_axis(windows, t[:, None, None] + 1 - n, axis=1)).all(axis=-1)
    gap = t + 1 - n - is_key.argmax(axis=1)
    assert not (gap % slot).any()
    return gap // slot


@pytest.mark.parametrize("ngram", [1, 2])
@pytest.mark.parametrize("questions", ["one", "all"])
def test_power_law_gaps_put_questions_nearer_than_uniform_ones(questions, ngram):
    sizes = {"ngram": ngram, "questions": questions, "length": 101, "multiples": (1,)}
    uniform, power = (question_gaps(recall(**sizes, gaps=gaps)).mean() for gaps in ("uniform", "power"))
    assert power < 0.7 * uniform


@pytest.mark.parametrize(("gaps", "exponent"), [("uniform", 0.0), ("power", -0.99)])
@pytest.mark.parametrize("questions", ["one", "all"])
def test_gaps_follow_their_law(questions, gaps, exponent):
    """With one pair: every possible gap occurs, in proportion to gap^exponent, within five standard errors."""
    rows, slots, left_over = 20011, 11, 1
    length = 1 + 2 * slots + (1 if questions == "one" else 2) + left_over
    task = recall(questions=questions, gaps=gaps, pairs=1, length=length, multiples=(1,))
    weight = np.arange(1.0, slots + 1) ** exponent
    share = weight / weight.sum()
    seen = np.bincount(question_gaps(task, rows), minlength=slots + 1)[1:]
    assert len(seen) == slots
    assert (np.abs(seen / rows - share) < 5 * np.sqrt(share * (1 - share) / rows)).all()


def test_twenty_thousand_examples_with_a_large_vocabulary():
    task = recall(keys=4096, values=4095, filler=1, pairs=5, gaps="power", length=61, multiples=(1,), train=20000)
    assert task.vocabulary == 8193
    inputs, targets = examples = splits(task)["train"]
    row, t = questions(examples).T
    assert (np.bincount(row) == 5).all()
    before = (inputs[row] == inputs[row, t][:, None]) & (np.arange(61) < t[:, None])
    assert (before.sum(axis=1) == 1).all()
    np.testing.assert_array_equal(inputs[row, before.argmax(axis=1) + 1], targets[row, t])
    assert len(np.unique(inputs[row, t])) == 4096
    assert len(np.unique(targets[row, t])) == 4095


@pytest.mark.parametrize(
    ("vocabulary", "inputs_type", "targets_type"),
    [
        (100, np.uint8, np.int8),
        (128, np.uint8, np.int8),
        (129, np.uint8, np.int16),
        (200, np.uint8, np.int16),
        (256, np.uint8, np.int16),
        (257, np.uint16, np.int16),
        (300, np.uint16, np.int16),
        (32769, np.uint16, np.int32),
        (40000, np.uint16, np.int32),
        (70000, np.uint32, np.int32),
    ],
)
def test_compact_keeps_the_values_in_the_smallest_types(vocabulary, inputs_type, targets_type):
    inputs = np.array([[0, 1, vocabulary - 1]])
    targets = np.array([[IGNORE, 0, vocabulary - 1]])
    compact = Examples(inputs, targets).compact()
    assert (compact.inputs.dtype, compact.targets.dtype) == (inputs_type, targets_type)
    assert same(compact, (inputs, targets))


@pytest.mark.parametrize(("count", "population"), [(1, 1), (1, 7), (3, 7), (7, 7), (13, 13), (5, 2**40)])
def test_draw_distinct_draws_different_numbers(count, population):
    drawn = draw_distinct(generator(0, "task", "train"), 101, count, population)
    assert drawn.shape == (101, count)
    assert drawn.min() >= 0
    assert drawn.max() < population
    assert all(len(set(row)) == count for row in drawn.tolist())


def test_draw_distinct_is_uniform_over_ordered_draws():
    """60 ordered draws of 3 of 5, 500 expected of each: chi-square has mean 59 and standard deviation 10.9."""
    drawn = draw_distinct(generator(0, "task", "train"), 30000, 3, 5)
    counts = Counter(map(tuple, drawn.tolist()))
    assert len(counts) == 60
    assert sum((count - 500) ** 2 / 500 for count in counts.values()) < 59 + 5 * 10.9


def test_streams_differ_by_seed_name_and_split():
    keys = itertools.product((0, 1, 11), ("ar", "nar"), ("train", "valid", "test_29", "test_58"))
    streams = [tuple(generator(*key).integers(0, 2**60, size=3).tolist()) for key in keys]
    assert len(set(streams)) == 24
    assert len(set(itertools.chain(*streams))) == 72


def test_a_stream_is_the_same_whatever_was_drawn_before():
    first = generator(3, "ar", "valid").random(5)
    generator(3, "ar", "train").random(1001)
    assert np.array_equal(generator(3, "ar", "valid").random(5), first)


@pytest.mark.parametrize("task", [recall(), recall(gaps="power", questions="one"), copying(), copying(unique=False)])
def test_global_random_state_is_neither_used_nor_changed(task):
    def states():
        return [random.getstate(), [str(part) for part in np.random.get_state()], torch.get_rng_state().tolist()]

    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    before = states()
    first = splits(task)
    assert states() == before
    random.seed(7)
    np.random.seed(7)
    torch.manual_seed(7)
    again = splits(task)
    assert all(same(first[name], again[name]) for name in first)


@pytest.mark.parametrize("task", [recall(train=211, valid=101, test=101), copying(train=211, valid=101, test=101)])
def test_no_two_splits_share_an_example(task):
    seen = [{row.tobytes() for row in examples.inputs} for examples in splits(task).values() if examples.inputs.shape[1] == 29]
    assert [len(rows) for rows in seen] == [211, 101, 101]
    assert len(set.union(*seen)) == 211 + 101 + 101


@pytest.mark.parametrize("make", [recall, copying])
def test_a_split_is_the_same_whatever_the_sizes_of_the_others(make):
    first, larger = splits(make()), splits(make(train=101, test=53))
    assert same(first["valid"], larger["valid"])
    first, larger = splits(make()), splits(make(train=101, valid=53))
    assert all(same(first[name], larger[name]) for name in first if name.startswith("test"))
    assert same(splits(make())["test_58"], splits(make(multiples=(1, 2)))["test_58"])


@pytest.mark.parametrize(
    ("task", "digest"),
    [
        (recall(gaps="power"), "1db18796be164f48"),
        (recall(ngram=2, keys=3, questions="one"), "20e486dd68c41fc4"),
        (copying(), "ce2299ba80df5eee"),
        (copying(unique=False), "38cb8bde45eb15b6"),
    ],
)
def test_the_first_examples_are_these_on_every_machine(task, digest):
    examples = task.examples("train", 29, 3, generator(0, "task", "train"))
    assert hashlib.sha256(b"".join(array.astype("<i8").tobytes() for array in examples)).hexdigest()[:16] == digest


def test_windows_of_bytes_are_these_on_every_machine(file):
    task = text(file)
    drawn = [task.examples(split, 29, 3, generator(0, "task", split)) for split in ("train", "valid", "test")]
    digest = hashlib.sha256(b"".join(array.astype("<i8").tobytes() for examples in drawn for array in examples))
    assert digest.hexdigest()[:16] == "bc2d64c6dbdd572c"


def letters(count, seed):
    return bytes(np.random.Generator(np.random.PCG64(seed)).integers(97, 123, size=count, dtype=np.uint8))


@pytest.fixture
def folder(tmp_path):
    """41 files of 97 random letters, some in folders below, and one that is no text."""
    for i in range(41):
        path = tmp_path / ("deep/er" if i % 3 else "") / f"{i}.{'md' if i % 2 else 'txt'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(letters(97, i))
    (tmp_path / "code.py").write_bytes(letters(97, 41))
    return tmp_path


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "one.txt"
    path.write_bytes(letters(4001, 0))
    return path


def parts(source):
    return {split: bytes(part) for split, part in corpus(str(source)).items()}


def test_every_file_of_a_folder_is_whole_in_one_split(folder):
    split = parts(folder)
    where = [[name for name, part in split.items() if letters(97, i) in part] for i in range(42)]
    assert [len(names) for names in where] == [1] * 41 + [0]
    assert {name: [name] in where for name in split} == {"train": True, "valid": True, "test": True}
    assert where.count(["train"]) > 20
    assert sum(map(len, split.values())) == 41 * 97 + 2 * (41 - 3)


def test_a_new_file_moves_no_other(folder):
    before = parts(folder)
    for name in "abc":
        (folder / f"{name}.txt").write_bytes(b"." * 11)
    corpus.cache_clear()
    after = parts(folder)
    assert sum(part.count(b"." * 11) for part in after.values()) == 3
    assert {split: part.replace(b"." * 11 + b"\n\n", b"") for split, part in after.items()} == before


def test_a_single_file_is_cut_into_stretches(file):
    split = parts(file)
    assert b"".join(split[name] for name in ("train", "valid", "test")) == file.read_bytes()
    assert [len(split[name]) for name in ("train", "valid", "test")] == [3200, 400, 401]


@pytest.mark.parametrize("source", ["folder", "file"])
def test_windows_of_text_come_from_their_split_and_ask_the_next_byte(source, request):
    source = request.getfixturevalue(source)
    split = parts(source)
    task = text(source)
    assert (task.vocabulary, task.lengths) == (256, LENGTHS)
    for name, (inputs, targets) in splits(task).items():
        own = name.partition("_")[0]
        asked = targets != IGNORE
        np.testing.assert_array_equal(targets[:, :-1][asked[:, :-1]], next_tokens(inputs)[asked[:, :-1]])
        assert own == "test" or asked.all()
        for row, answer in zip(inputs, targets[:, -1], strict=True):
            window = bytes([*row, answer])
            assert [part for part in split if window in split[part]] == [own]


@pytest.mark.parametrize("source", ["folder", "file"])
def test_test_windows_score_the_same_targets_at_every_length(source, request):
    task = text(request.getfixturevalue(source), test=13)
    shortest, *longer = (task.examples("test", length, 13, generator(0, "task", f"test_{length}")) for length in LENGTHS)
    scored = shortest.targets[:, 7:]
    assert (shortest.targets[:, :7] == IGNORE).all()
    assert (scored != IGNORE).all()
    assert len({row.tobytes() for row in scored}) == 13
    for inputs, targets in longer:
        np.testing.assert_array_equal(inputs[:, -14:], shortest.inputs)
        np.testing.assert_array_equal(targets[:, -7:], scored)
        assert (targets[:, :-7] == IGNORE).all()


def test_an_odd_shortest_window_scores_the_larger_half(file):
    _, targets = text(file, multiples=(1, 2)).examples("test", 58, 3, generator(0, "task", "test_58"))
    assert ((targets != IGNORE).sum(axis=1) == 15).all()


def test_only_training_windows_are_drawn_at_random(file):
    task = text(file)
    for split in ("train", "valid", "test"):
        a, b = (task.examples(split, 29, 5, generator(seed, "task", split)) for seed in (0, 1))
        assert same(a, b) == (split != "train")


@pytest.mark.parametrize(("size", "windows"), [(53, 11), (40, 1)])
def test_training_windows_are_every_window_of_the_split(size, windows, tmp_path):
    path = tmp_path / "short.txt"
    path.write_bytes(letters(size, 0))
    inputs, targets = many(text(path, length=31, multiples=(1,)), length=31)
    seen = {bytes([*row, last]) for row, last in zip(inputs, targets[:, -1], strict=True)}
    assert seen == {path.read_bytes()[i : i + 32] for i in range(windows)}


def test_text_leaves_the_global_random_state_alone(file):
    before = random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()
    splits(text(file))
    assert (random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()) == before


def test_the_default_corpus_is_the_documentation_of_the_interpreter(tmp_path, monkeypatch):
    """Of a standard library made up here: docstrings of modules, classes and functions, and `pydoc_data.topics`."""
    kept = ("a.py", "b.py", "package/b.py", "package/c.py")
    code = '"""The module."""\nclass A:\n    """The class."""\n    def f(self):\n        """The method."""\n        "zebra"\n'
    for name in (*kept, "test/d.py", "site-packages/e.py", "pydoc_data/topics.py"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(code.replace("The", name))
    (tmp_path / "broken.py").write_text("def f(:")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: {"stdlib": str(tmp_path)}[name])
    rglob, found = Path.rglob, []
    for backwards in (False, True):
        monkeypatch.setattr(Path, "rglob", lambda *arguments, backwards=backwards: sorted(rglob(*arguments), reverse=backwards))
        corpus.cache_clear()
        found.append(parts("python-docs"))
    corpus.cache_clear()
    split, again = found
    assert split == again, "the order of a file system must not matter"
    prose = b"\n\n".join(split.values())
    for name in kept:
        assert prose.count(f"{name} module.\n\n{name} class.\n\n{name} method.".encode()) == 1
    for absent in (b"test/d.py", b"e.py class", b"topics.py class", b"zebra"):
        assert absent not in prose
    from pydoc_data.topics import topics

    for title in ("assert", "booleans", "lambda", "while"):
        assert [topics[title].encode() in part for part in split.values()].count(True) == 1
    assert len(split["train"]) > 5 * max(len(split["valid"]), len(split["test"])) > 0


def missing(folder):
    return folder / "nowhere.txt", "No such file or directory"


def not_utf8(folder):
    path = folder / "latin.txt"
    path.write_bytes(letters(11, 0) + b"\xe9t\xe9")
    return path, "byte 11 is not UTF-8"


def nothing(folder):
    (folder / "code.py").write_text("pass")
    return folder, "no .txt or .md file in it"


def exactly(words):
    return rf"\A{re.escape(words)}\Z"


@pytest.mark.parametrize("fault", [missing, not_utf8, nothing])
def test_a_source_without_text_is_refused_in_one_line(fault, tmp_path):
    path, reason = fault(tmp_path)
    with pytest.raises(ValueError, match=exactly(f"{path}: {reason}")):
        many(text(path))


def test_a_fault_inside_a_folder_names_the_file(folder):
    path, reason = not_utf8(folder)
    with pytest.raises(ValueError, match=exactly(f"{path}: {reason}")):
        many(text(folder))


@pytest.mark.parametrize(("split", "window", "held"), [("train", 29, 29), ("valid", 29, 4), ("test", 145, 4)])
def test_too_little_text_is_refused_in_one_line(split, window, held, tmp_path):
    """The longest test window counts, at every length, for all of them end at the same bytes."""
    path = tmp_path / "short.txt"
    path.write_bytes(letters(37, 0))
    words = f"the {split} split of {path} has {held} bytes, too few for 3 windows of {window} bytes"
    with pytest.raises(ValueError, match=exactly(words)):
        text(path).examples(split, 29, 3, generator(0, "task", split))


def test_an_empty_file_has_too_little_text(tmp_path):
    path = tmp_path / "empty.txt"
    path.touch()
    with pytest.raises(ValueError, match="has 0 bytes, too few for"):
        many(text(path))


@pytest.mark.parametrize(
    ("make", "changes", "words"),
    [
        (recall, {"keys": 2}, "pairs = 3 is more than the 2 1-grams over keys = 2"),
        (recall, {"ngram": 3, "keys": 2, "pairs": 9}, "pairs = 9 is more than the 8 3-grams over keys = 2"),
        (recall, {"length": 12}, "a sequence of 12 tokens cannot hold 3 pairs and their questions, which take 13"),
        (recall, {"multiples": (0.25, 1)}, "a sequence of 7 tokens cannot hold 1 pairs and their questions, which take 5"),
        (
            recall,
            {"ngram": 3, "keys": 2, "pairs": 5, "questions": "one", "length": 24, "multiples": (0.3, 1)},
            "a sequence of 7 tokens cannot hold 1 pairs and their questions, which take 8",
        ),
        (copying, {"signals": 8}, "signals = 8 unique signals need an alphabet of as many, not 7"),
        (copying, {"multiples": (0.25, 1)}, "a sequence of 7 tokens cannot hold signals = 5 twice and the separator"),
        (text, {"multiples": (0.05, 1)}, "a window of 1 token has no context"),
        (text, {"folder": "x"}, "folder is where wikitext-103 lies; another corpus is named by its path, as the source"),
        (text, {"vocabulary_size": 300}, "vocabulary_size = 300 with tokens = bytes, which are 256; take bpe or words"),
        (text, {"tokens": "bpe"}, "tokens = bpe needs vocabulary_size, the number of bytes and merges"),
        (
            text,
            {"tokens": "bpe", "vocabulary_size": 256},
            "vocabulary_size = 256 leaves nothing to merge: bpe begins with 256 bytes",
        ),
        *(
            (make, {"multiples": multiples}, f"multiples = {shown} must rise and have 1, the training length, among them")
            for make in (recall, copying, text)
            for multiples, shown in (
                ((2, 4), "[2.0, 4.0]"),
                ((2, 1), "[2.0, 1.0]"),
                ((1, 4, 2), "[1.0, 4.0, 2.0]"),
                ((1, 2, 2), "[1.0, 2.0, 2.0]"),
            )
        ),
    ],
)
def test_a_configuration_that_breaks_a_rule_is_refused_in_words(make, changes, words):
    arguments = {"source": "python-docs"} if make is text else {}
    with pytest.raises(ValidationError) as refused:
        make(**arguments, **changes)
    (fault,) = refused.value.errors()
    assert str(fault["ctx"]["error"]) == words


@pytest.mark.parametrize(
    ("make", "changes"),
    [
        (recall, {"length": 13, "multiples": (1,)}),
        (recall, {"ngram": 3, "keys": 2, "pairs": 5, "questions": "one", "length": 24, "multiples": (1,)}),
        (copying, {"length": 11, "multiples": (1,)}),
        (copying, {"signals": 7, "alphabet": 7, "multiples": (1,)}),
        (copying, {"signals": 7, "alphabet": 1, "unique": False, "multiples": (1,)}),
    ],
)
def test_a_configuration_on_the_edge_of_its_rules_is_right(make, changes):
    task = make(**changes)
    inputs, targets = many(task, 53, task.length)
    np.testing.assert_array_equal(answers(task, inputs), targets)
