"""The tasks: an oracle finds the only answer of every query, and examples are a pure function of their arguments."""

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
from cat.tasks.copying import Copying
from cat.tasks.corpus import corpus
from cat.tasks.recall import Recall
from cat.tasks.registry import IGNORE, Examples, generator
from cat.tasks.text import Text

SIZES = {"length": 29, "multiples": (0.5, 1, 2, 5), "train_examples": 7, "valid_examples": 5, "test_examples": 3}
LENGTHS = (14, 29, 58, 145)
# Keys for each N, and pairs at each length: proportional to the length, at most the 11, 9 and 8 possible N-grams.
KEYS = {1: 11, 2: 3, 3: 2}
PAIRS = {1: (1, 3, 6, 11), 2: (1, 3, 6, 9), 3: (1, 3, 6, 8)}


def recall(**changes):
    default = {"ngram": 1, "keys": 11, "values": 13, "filler": 5, "pairs": 3, "queries": "all", "query_gap": "uniform"}
    return Recall(**{"kind": "recall", **SIZES, **default, **changes})


def copying(**changes):
    default = {"signals": 5, "alphabet": 7, "noise": 3, "unique": True}
    return Copying(**{"kind": "copying", **SIZES, **default, **changes})


def text(source, **changes):
    return Text(**{"kind": "text", "source": str(source), **SIZES, **changes})


RECALL = [
    pytest.param(recall(ngram=n, keys=KEYS[n], queries=queries, query_gap=gap, filler=filler), id=f"{n}-{queries}-{gap}-{filler}")
    for n, (queries, gap, filler) in itertools.product(
        (1, 2, 3), [("one", "uniform", 5), ("one", "power", 1), ("all", "uniform", 1), ("all", "power", 5)]
    )
]
COPYING = [pytest.param(copying(unique=unique), id="unique" if unique else "repeated") for unique in (True, False)]


def splits(task, seed=0):
    """Every split of a task by name, drawn as the study draws it."""
    sizes = {"train": ("train", task.length, task.train_examples), "valid": ("valid", task.length, task.valid_examples)}
    sizes |= {f"test_{length}": ("test", length, task.test_count(length)) for length in task.lengths}
    return {name: task.examples(*size, generator(seed, "task", name)) for name, size in sizes.items()}


def with_lengths(task, *lengths):
    """The same task, trained on several lengths."""
    return type(task)(**(task.model_dump() | {"length": lengths}))


def many(task, count=500, length=29, seed=0):
    return task.examples("train", length, count, generator(seed, "task", "train"))


def target_positions(examples):
    """Row and position of every target, row by row."""
    return np.argwhere(examples.targets != IGNORE)


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("task", RECALL + COPYING)
def test_the_targets_are_those_of_the_oracle(task):
    assert task.lengths == LENGTHS
    for name, examples in splits(task).items():
        inputs, targets = examples
        count, length = {"train": (7, 29), "valid": (5, 29)}.get(name) or (3, int(name.removeprefix("test_")))
        assert inputs.shape == targets.shape == (count, length)
        unanswered = Examples(inputs, np.full_like(targets, IGNORE))
        np.testing.assert_array_equal(task.oracle(unanswered), targets, err_msg=name)


@pytest.mark.parametrize("task", [with_lengths(task.values[0], 14, 20, 29) for task in RECALL + COPYING])
def test_each_training_length_has_its_share_of_the_examples(task):
    assert (task.length, task.lengths, task.training_counts) == (29, LENGTHS, {14: 3, 20: 2, 29: 2})
    for length, count in task.training_counts.items():
        inputs, targets = task.training(length, generator(0, "task", f"train_{length}"))
        assert inputs.shape == targets.shape == (count, length)
        np.testing.assert_array_equal(task.oracle(Examples(inputs, np.full_like(targets, IGNORE))), targets)


@pytest.mark.parametrize("lengths", [29, (14, 20, 29), {"from": 14, "to": 29}])
def test_a_task_is_read_back_with_its_training_lengths(lengths):
    task = recall(length=lengths, train_examples=8)
    assert recall(**task.model_dump(mode="json")) == task
    assert isinstance(task.model_dump()["length"], int) == (lengths == 29)


@pytest.mark.parametrize(("first", "last", "count"), [(14, 145, 8), (20, 23, 4), (2**30, 2**31 - 1, 8)])
def test_a_range_of_lengths_has_equal_ratios(first, last, count):
    lengths = copying(length={"from": first, "to": last}, train_examples=8).training_lengths
    assert (lengths[0], lengths[-1], len(lengths)) == (first, last, count)
    if count == 8:
        np.testing.assert_allclose(np.diff(np.log(lengths)), np.log(last / first) / 7, atol=1 / first)


@pytest.mark.parametrize("task", RECALL)
def test_the_key_of_a_query_occurs_once_before_it(task):
    n = task.ngram
    for examples in splits(task).values():
        windows = np.lib.stride_tricks.sliding_window_view(examples.inputs, n, axis=1)
        for row, t in target_positions(examples):
            is_key = (windows[row, : t + 2 - n] == windows[row, t + 1 - n]).all(axis=-1)
            assert is_key[-1]
            assert is_key[:-1].sum() == 1


@pytest.mark.parametrize("task", RECALL)
def test_a_recall_sequence_has_the_pairs_and_queries_of_its_length(task):
    for length, pairs in zip(LENGTHS, PAIRS[task.ngram], strict=True):
        inputs, targets = task.examples("test", length, 3, generator(0, "task", "test"))
        queries = (targets != IGNORE).sum(axis=1)
        assert task.pairs_at(length) == pairs
        assert set(queries) == {pairs if task.queries == "all" else 1}
        is_key, is_value = (inputs >= 1) & (inputs <= task.keys), (task.keys < inputs) & (inputs <= task.keys + task.values)
        assert set(is_value.sum(axis=1)) == {pairs}
        np.testing.assert_array_equal(is_key.sum(axis=1), task.ngram * (pairs + queries))
        if task.queries == "one":
            assert (targets[:, -1] != IGNORE).all()
        else:
            slot = task.ngram + 1
            np.testing.assert_array_equal(np.flatnonzero(is_value.any(axis=0)), slot * np.arange(1, pairs + 1))


@pytest.mark.parametrize("task", RECALL)
def test_recall_has_separate_tokens_for_keys_values_and_filler(task):
    """BOS occurs only first. Keys, values and filler have separate ranges of tokens and use all of them."""
    assert task.vocabulary == 1 + task.keys + task.values + task.filler
    inputs, targets = examples = many(task)
    assert (inputs[:, 0] == 0).all()
    key_tokens, values, filler = np.split(np.arange(1, task.vocabulary), [task.keys, task.keys + task.values])
    row, t = target_positions(examples).T
    keys = inputs[row[:, None], t[:, None] - np.arange(task.ngram)]
    np.testing.assert_array_equal(np.unique(keys), key_tokens)
    np.testing.assert_array_equal(np.unique(targets[row, t]), values)
    np.testing.assert_array_equal(np.unique(inputs[:, 1:]), np.concatenate([key_tokens, values, filler]))


@pytest.mark.parametrize("task", COPYING)
def test_copying_has_separate_tokens_for_signals_and_noise(task):
    assert task.vocabulary == 2 + task.alphabet + task.noise
    for length in LENGTHS:
        inputs, targets = many(task, length=length)
        separator = length - task.signals
        context, expected = inputs[:, 1:separator], targets[:, separator:]
        is_signal = (context >= 2) & (context < 2 + task.alphabet)
        assert (inputs[:, 0] == 0).all()
        assert (inputs[:, separator] == 1).all()
        assert set(is_signal.sum(axis=1)) == {task.signals} == {(row != IGNORE).sum() for row in targets}
        assert is_signal.any(axis=0).all(), "a position that never has a signal"
        np.testing.assert_array_equal(np.unique(context[is_signal]), np.arange(2, 2 + task.alphabet))
        np.testing.assert_array_equal(np.unique(context[~is_signal]), np.arange(2 + task.alphabet, task.vocabulary))
        np.testing.assert_array_equal(inputs[:, separator + 1 :], expected[:, :-1])
        distinct = {len(set(row)) for row in expected.tolist()}
        assert distinct == {task.signals} if task.unique else min(distinct) < task.signals


def unigram_accuracy(task):
    """Mean accuracy of a solver that sees only the last token of a key and guesses among the values that followed it."""
    inputs, targets = examples = many(task, length=task.length)
    scores = []
    for row, t in target_positions(examples):
        tokens, following = inputs[row, :t], inputs[row, 1 : t + 1]
        is_value = (following > task.keys) & (following <= task.keys + task.values)
        guesses = following[(tokens == inputs[row, t]) & is_value]
        scores.append((guesses == targets[row, t]).mean())
    return np.mean(scores)


@pytest.mark.parametrize("queries", ["one", "all"])
def test_the_last_token_of_a_key_from_a_small_alphabet_does_not_identify_it(queries):
    sizes = {"length": 53, "multiples": (1,), "queries": queries, "values": 31}
    assert unigram_accuracy(recall(**sizes, ngram=1, keys=31, pairs=8)) == 1
    assert unigram_accuracy(recall(**sizes, ngram=2, keys=31, pairs=4)) > 0.9, "a large alphabet identifies the key"
    assert unigram_accuracy(recall(**sizes, ngram=2, keys=4, pairs=8)) < 0.6
    assert unigram_accuracy(recall(**sizes, ngram=3, keys=2, pairs=6)) < 0.5


def query_gaps(task, count=4001):
    """Distance of each query from its key, in slots of one pair."""
    n, slot = task.ngram, task.ngram + 1
    examples = many(task, count, task.length)
    row, t = target_positions(examples).T
    windows = np.lib.stride_tricks.sliding_window_view(examples.inputs, n, axis=1)[row]
    is_key = (windows == np.take_along_axis(windows, t[:, None, None] + 1 - n, axis=1)).all(axis=-1)
    gap = t + 1 - n - is_key.argmax(axis=1)
    assert not (gap % slot).any()
    return gap // slot


@pytest.mark.parametrize("ngram", [1, 2])
@pytest.mark.parametrize("queries", ["one", "all"])
def test_power_law_gaps_are_shorter_than_uniform_gaps(queries, ngram):
    sizes = {"ngram": ngram, "queries": queries, "length": 101, "multiples": (1,)}
    uniform, power = (query_gaps(recall(**sizes, query_gap=gap), 1009).mean() for gap in ("uniform", "power"))
    assert power < 0.7 * uniform


@pytest.mark.parametrize(("gap", "exponent"), [("uniform", 0.0), ("power", -0.99)])
@pytest.mark.parametrize("queries", ["one", "all"])
def test_gaps_follow_their_distribution(queries, gap, exponent):
    """With one pair, every possible gap occurs in proportion to gap^exponent, within five standard errors."""
    rows, slots, left_over = 20011, 11, 1
    length = 1 + 2 * slots + (1 if queries == "one" else 2) + left_over
    task = recall(queries=queries, query_gap=gap, pairs=1, length=length, multiples=(1,))
    weight = np.arange(1.0, slots + 1) ** exponent
    share = weight / weight.sum()
    seen = np.bincount(query_gaps(task, rows), minlength=slots + 1)[1:]
    assert len(seen) == slots
    assert (np.abs(seen / rows - share) < 5 * np.sqrt(share * (1 - share) / rows)).all()


def test_many_examples_with_a_large_vocabulary():
    task = recall(keys=4096, values=4095, filler=1, pairs=5, query_gap="power", length=61, multiples=(1,), train_examples=20000)
    assert task.vocabulary == 8193
    inputs, targets = examples = splits(task)["train"]
    row, t = target_positions(examples).T
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
def test_compact_uses_the_smallest_types(vocabulary, inputs_type, targets_type):
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


def test_generators_differ_by_seed_name_and_split():
    keys = itertools.product((0, 1, 11), ("ar", "nar"), ("train", "valid", "test_29", "test_58"))
    draws = [tuple(generator(*key).integers(0, 2**60, size=3).tolist()) for key in keys]
    assert len(set(draws)) == 24
    assert len(set(itertools.chain(*draws))) == 72


def test_a_generator_does_not_depend_on_earlier_draws():
    first = generator(3, "ar", "valid").random(5)
    generator(3, "ar", "train").random(1001)
    assert np.array_equal(generator(3, "ar", "valid").random(5), first)


@pytest.mark.parametrize("task", [recall(), recall(query_gap="power", queries="one"), copying(), copying(unique=False)])
def test_the_global_random_state_is_neither_used_nor_changed(task):
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


@pytest.mark.parametrize(
    "task",
    [make(train_examples=211, valid_examples=101, test_examples=101) for make in (recall, copying)],
    ids=["recall", "copying"],
)
def test_no_two_splits_share_an_example(task):
    seen = [{row.tobytes() for row in examples.inputs} for examples in splits(task).values() if examples.inputs.shape[1] == 29]
    assert [len(rows) for rows in seen] == [211, 101, 101]
    assert len(set.union(*seen)) == 211 + 101 + 101


@pytest.mark.parametrize("make", [recall, copying])
def test_a_split_does_not_depend_on_the_sizes_of_the_others(make):
    first, larger = splits(make()), splits(make(train_examples=101, test_examples=53))
    assert same(first["valid"], larger["valid"])
    first, larger = splits(make()), splits(make(train_examples=101, valid_examples=53))
    assert all(same(first[name], larger[name]) for name in first if name.startswith("test"))
    assert same(splits(make())["test_58"], splits(make(multiples=(1, 2)))["test_58"])


@pytest.mark.parametrize(
    ("task", "digest"),
    [
        (recall(query_gap="power"), "1db18796be164f48"),
        (recall(ngram=2, keys=3, queries="one"), "20e486dd68c41fc4"),
        (copying(), "ce2299ba80df5eee"),
        (copying(unique=False), "38cb8bde45eb15b6"),
    ],
)
def test_the_first_examples_are_the_same_on_every_machine(task, digest):
    examples = task.examples("train", 29, 3, generator(0, "task", "train"))
    assert hashlib.sha256(b"".join(array.astype("<i8").tobytes() for array in examples)).hexdigest()[:16] == digest


def test_windows_of_bytes_are_the_same_on_every_machine(file):
    task = text(file)
    drawn = [task.examples(split, 29, 3, generator(0, "task", split)) for split in ("train", "valid", "test")]
    digest = hashlib.sha256(b"".join(array.astype("<i8").tobytes() for examples in drawn for array in examples))
    assert digest.hexdigest()[:16] == "9c75585d2c3de20e"


def letters(count, seed):
    return bytes(np.random.Generator(np.random.PCG64(seed)).integers(97, 123, size=count, dtype=np.uint8))


@pytest.fixture
def folder(tmp_path):
    """41 files of 97 random letters, some in subfolders, and one file that is not text."""
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
    found_in = [[name for name, part in split.items() if letters(97, i) in part] for i in range(42)]
    assert [len(names) for names in found_in] == [1] * 41 + [0]
    assert {name: [name] in found_in for name in split} == {"train": True, "valid": True, "test": True}
    assert found_in.count(["train"]) > 20
    assert sum(map(len, split.values())) == 41 * 97 + 2 * (41 - 3)


def test_a_new_file_moves_no_other(folder):
    before = parts(folder)
    for name in "abc":
        (folder / f"{name}.txt").write_bytes(b"." * 11)
    corpus.cache_clear()
    after = parts(folder)
    assert sum(part.count(b"." * 11) for part in after.values()) == 3
    assert {split: part.replace(b"." * 11 + b"\n\n", b"") for split, part in after.items()} == before


def test_a_single_file_is_cut_by_position(file):
    split = parts(file)
    assert b"".join(split[name] for name in ("train", "valid", "test")) == file.read_bytes()
    assert [len(split[name]) for name in ("train", "valid", "test")] == [3200, 400, 401]


@pytest.mark.parametrize("source", ["folder", "file"])
def test_windows_of_text_come_from_their_split_and_target_the_next_byte(source, request):
    source = request.getfixturevalue(source)
    split = parts(source)
    task = text(source)
    assert (task.vocabulary, task.lengths) == (256, LENGTHS)
    for name, (inputs, targets) in splits(task).items():
        own = name.partition("_")[0]
        is_target = targets != IGNORE
        np.testing.assert_array_equal(targets[:, :-1][is_target[:, :-1]], inputs[:, 1:][is_target[:, :-1]])
        assert own == "test" or is_target.all()
        for row, answer in zip(inputs, targets[:, -1], strict=True):
            window = bytes([*row, answer])
            assert [part for part in split if window in split[part]] == [own]


@pytest.mark.parametrize("source", ["folder", "file"])
def test_test_windows_score_the_same_targets_at_every_length(source, request):
    source = request.getfixturevalue(source)
    task, split = text(source), parts(source)["test"]
    scored = []
    for length in LENGTHS:
        inputs, targets = task.examples("test", length, 3, generator(0, "task", f"test_{length}"))
        for row, answers in zip(inputs, targets, strict=True):
            count = int((answers != IGNORE).sum())
            assert (answers[-count:] != IGNORE).all(), "targets are the end of the window"
            assert count <= (length + 1) // 2, "each target has at least half of the window before it"
            assert bytes([*row, answers[-1]]) in split
        scored.append(targets[targets != IGNORE].tolist())
    assert all(answers == scored[0] for answers in scored)
    begins = [split.index(bytes(scored[0][start : start + 73])) for start in (0, 73, 146)]
    assert len(scored[0]) == 3 * 73
    assert all(later - earlier >= 73 for earlier, later in itertools.pairwise(begins)), "regions do not overlap"


def test_a_region_is_cut_into_parts_of_about_half_a_window(file):
    task = text(file, multiples=(1, 2))
    sizes = [(task.examples("test", length, 3, None).targets != IGNORE).sum(axis=1).tolist() for length in (29, 58)]
    assert sizes == [[14, 15] * 3, [29] * 3]


def test_too_many_regions_are_refused_in_one_line(file):
    assert len(text(file, test_examples=4).examples("test", 145, 4, None).inputs) == 4
    with pytest.raises(ValueError, match=r"401 bytes, too few for test_examples = 5 regions of 73 bytes.* at most 4 regions\Z"):
        text(file, test_examples=5).extents()


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
    """With a made-up standard library: docstrings of modules, classes and functions, and `pydoc_data.topics`."""
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
    assert split == again, "the order of the file system must not matter"
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
    return folder, "contains no .txt, .md or .tokens file with text (skipped: 1 (another extension: code.py))"


def exactly(message):
    return rf"\A{re.escape(message)}\Z"


@pytest.mark.parametrize("make", [missing, not_utf8, nothing])
def test_a_source_without_text_is_refused_in_one_line(make, tmp_path):
    path, reason = make(tmp_path)
    with pytest.raises(ValueError, match=exactly(f"{path}: {reason}")):
        many(text(path))


def test_an_error_inside_a_folder_names_the_file(folder):
    path, reason = not_utf8(folder)
    with pytest.raises(ValueError, match=exactly(f"{path}: {reason}")):
        many(text(folder))


@pytest.mark.parametrize(("split", "window", "held"), [("train", 29, 29), ("valid", 29, 4)])
def test_too_little_text_is_refused_in_one_line(split, window, held, tmp_path):
    path = tmp_path / "short.txt"
    path.write_bytes(letters(37, 0))
    message = f"the {split} split of {path} has {held} bytes, too few for 3 windows of {window} bytes"
    with pytest.raises(ValueError, match=exactly(message)):
        text(path).examples(split, 29, 3, generator(0, "task", split))


def test_an_empty_file_has_too_little_text(tmp_path):
    path = tmp_path / "empty.txt"
    path.touch()
    with pytest.raises(ValueError, match="has 0 bytes, too few for"):
        many(text(path))


@pytest.mark.parametrize(
    ("make", "changes", "message"),
    [
        (recall, {"keys": 2}, "pairs = 3 exceeds the 2 distinct 1-grams over keys = 2"),
        (recall, {"ngram": 3, "keys": 2, "pairs": 9}, "pairs = 9 exceeds the 8 distinct 3-grams"),
        (recall, {"length": 12}, "length 12 is too short for 3 pairs and their queries, which need 13 tokens"),
        (recall, {"multiples": (0.25, 1)}, "length 7 is too short for a pair: 3 pairs at length 29 give none"),
        (
            recall,
            {"ngram": 3, "keys": 2, "pairs": 5, "queries": "one", "length": 24, "multiples": (0.3, 1)},
            "length 7 is too short for 1 pairs and their queries, which need 8 tokens",
        ),
        (copying, {"signals": 8}, "signals = 8 exceeds alphabet = 7"),
        (copying, {"multiples": (0.25, 1)}, "length 7 is too short for signals = 5"),
        (text, {"multiples": (0.05, 1)}, "a window of 1 token has no context"),
        (text, {"folder": "x"}, "folder needs source = wikitext-103"),
        (text, {"vocabulary_size": 300}, "vocabulary_size = 300 needs tokens = bpe or words"),
        (text, {"tokens": "bpe"}, "tokens = bpe needs vocabulary_size"),
        (text, {"tokens": "bpe", "vocabulary_size": 256}, "vocabulary_size = 256 must exceed 256"),
        (recall, {"length": (5, 29)}, "length 5 is too short for a pair: 3 pairs at length 29 give none"),
        (copying, {"length": (10, 29)}, "length 10 is too short for signals = 5"),
        (recall, {"length": (20, 20, 29)}, "length = [20, 20, 29] must be ascending, each length once"),
        (recall, {"length": {"from": 14, "to": 29}}, "train_examples = 7 are too few for 8 training lengths"),
        (recall, {"multiples": (2, 4)}, "multiples = [2.0, 4.0] must be ascending and contain 1"),
        (recall, {"multiples": (2, 1)}, "multiples = [2.0, 1.0] must be ascending and contain 1"),
        (recall, {"multiples": (1, 4, 2)}, "multiples = [1.0, 4.0, 2.0] must be ascending and contain 1"),
        (recall, {"multiples": (1, 2, 2)}, "multiples = [1.0, 2.0, 2.0] must be ascending and contain 1"),
        (copying, {"multiples": (2, 4)}, "multiples = [2.0, 4.0] must be ascending and contain 1"),
        (text, {"multiples": (2, 4)}, "multiples = [2.0, 4.0] must be ascending and contain 1"),
    ],
)
def test_a_configuration_that_breaks_a_rule_is_refused(make, changes, message):
    arguments = {"source": "python-docs"} if make is text else {}
    with pytest.raises(ValidationError) as error:
        make(**arguments, **changes)
    (found,) = error.value.errors()
    assert str(found["ctx"]["error"]).startswith(message)


@pytest.mark.parametrize(
    ("make", "changes"),
    [
        (recall, {"length": 13, "multiples": (1,)}),
        (recall, {"ngram": 3, "keys": 2, "pairs": 5, "queries": "one", "length": 24, "multiples": (1,)}),
        (copying, {"length": 11, "multiples": (1,)}),
        (copying, {"signals": 7, "alphabet": 7, "multiples": (1,)}),
        (copying, {"signals": 7, "alphabet": 1, "unique": False, "multiples": (1,)}),
    ],
)
def test_a_configuration_at_the_limit_of_its_rules_is_valid(make, changes):
    task = make(**changes)
    examples = many(task, 53, task.length)
    np.testing.assert_array_equal(task.oracle(examples), examples.targets)


def test_longer_tests_have_proportionally_fewer_examples():
    task = copying(test_examples=64, min_test_examples=20, multiples=(0.5, 1, 2, 4, 8))
    assert [task.test_count(length) for length in task.lengths] == [64, 64, 32, 20, 20]
    assert {len(split.inputs) for name, split in splits(task).items() if name.startswith("test")} == {64, 32, 20}
    with pytest.raises(ValueError, match="min_test_examples = 65 exceeds test_examples = 64"):
        copying(test_examples=64, min_test_examples=65)
