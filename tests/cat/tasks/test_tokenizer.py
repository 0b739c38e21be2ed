"""Tokenizers lose no text, train deterministically and know what each token stands for; scores compare them fairly."""

import functools
import hashlib
import math
import os
import re
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from cat.evaluation.scores import Scores, SequenceTotals
from cat.tasks.base import Extents
from cat.tasks.registry import IGNORE, generator
from cat.tasks.text import Text
from cat.tasks.tokenizer import BPE, Bytes, Words, load
from pipeline.cli import main
from pipeline.config.grid import cells
from pipeline.config.load import load_study
from pipeline.stages.evaluate import _sequences, metrics
from pipeline.stages.generate import generate
from pipeline.stages.plan import changed_sources
from pipeline.storage.files import read_json
from pipeline.storage.paths import DATA, HELDOUT, RESULTS, SCORES
from pipeline.storage.scores import read_scores
from pipeline.storage.task_data import read_meta, read_split, read_training
from tests.helpers.study import ROOT, edit, stage, tiny_study

PROSE = (
    "The cat sat on the mat .\n The other cat , a tabby , sat on <unk> 's hat .\n\n"
    + "A naïve théorie of cats \n  and\tmats says that they sit . \n" * 7
    + "Hats are for the others , not for 12 cats .\n" * 5
)


def array(text):
    return np.frombuffer(text.encode(), dtype=np.uint8)


@functools.cache
def trained(name):
    train = array(PROSE)
    return {
        "bytes": Bytes,
        "bpe": lambda: BPE.learn(train, 300),
        "words": lambda: Words.learn(train, None),
        "few": lambda: Words.learn(train, 9),
    }[name]()


@functools.cache
def library(name):
    """The saved tokenizer, loaded by the `tokenizers` library."""
    return Tokenizer.from_str(trained(name).save())


@functools.cache
def restored(name):
    """The saved tokenizer, loaded again by this project."""
    return load(trained(name).save())


ALL = pytest.mark.parametrize("name", ["bytes", "bpe", "words", "few"])
TEXTS = st.text(st.sampled_from("ab é\n\t€ <unk>\u00a0🐈cats"), max_size=60) | st.text(st.characters(codec="utf-8"), max_size=30)


@given(TEXTS)
def test_bpe_decodes_to_the_encoded_text(text):
    tokenizer, saved = trained("bpe"), library("bpe")
    tokens = tokenizer.encode(array(text))
    assert saved.decode(tokens.tolist()) == text
    ends = np.cumsum(tokenizer.sizes(array(text), tokens))
    starts = np.concatenate([[0], ends[:-1]]) if len(ends) else ends
    pieces = [text.encode()[a:b] for a, b in zip(starts, ends, strict=True)]
    assert b"".join(pieces) == text.encode()
    for token, piece in zip(tokens.tolist(), pieces, strict=True):
        if piece.isascii():
            assert saved.decode([token]).encode() == piece


@given(TEXTS)
def test_word_tokens_are_the_words_between_white_space_or_unknown(text):
    data = array(text)
    naive = [word for line in text.encode().splitlines(True) for word in line.split() + [b"<eos>"] * line.endswith(b"\n")]
    for name in ("words", "few"):
        tokenizer = trained(name)
        tokens, saved = tokenizer.encode(data), library(name)
        known = saved.get_vocab()
        assert [saved.id_to_token(token).encode() for token in tokens] == [w if w.decode() in known else b"<unk>" for w in naive]
        unknown = [0 if word.decode() in known else len(word) for word in naive]
        np.testing.assert_array_equal(tokenizer.unknown(data, tokens), unknown)
        ends = np.cumsum(tokenizer.sizes(data, tokens))
        for word, end in zip(naive, ends, strict=True):
            assert text.encode()[:end].endswith(b"\n" if word == b"<eos>" else word)


def test_training_bpe_on_a_long_run_of_letters_takes_linear_time():
    letters = np.random.Generator(np.random.PCG64(0)).choice(np.frombuffer(b"acgt", np.uint8), 160_000)
    started = time.process_time()
    tokenizer = BPE.learn(letters, 300)
    assert time.process_time() - started < 12, "it was 24 s when quadratic"
    assert max(map(len, tokenizer._pieces)) > 1
    assert sum(tokenizer.sizes(letters, tokenizer.encode(letters))) == len(letters)


@ALL
def test_a_saved_tokenizer_works_in_the_tokenizers_library(name):
    tokenizer, saved = trained(name), trained(name).save()
    if name == "bytes":
        assert saved is None
        return
    assert library(name).get_vocab_size() == tokenizer.size
    lines = [*PROSE.splitlines(keepends=True), "unheard-of wörds\n", " \u00a0 x"]
    expected = np.concatenate([library(name).encode(line).ids for line in lines])
    np.testing.assert_array_equal(tokenizer.encode(array("".join(lines))), expected)


@given(TEXTS)
def test_a_loaded_tokenizer_gives_the_same_tokens(text):
    for name in ("bpe", "words", "few"):
        tokenizer, loaded = trained(name), restored(name)
        tokens = tokenizer.encode(array(text))
        np.testing.assert_array_equal(loaded.encode(array(text)), tokens)
        assert loaded.encode(array(text)).dtype == tokens.dtype
        assert (loaded.size, loaded.save()) == (tokenizer.size, tokenizer.save())
        np.testing.assert_array_equal(loaded.sizes(array(text), tokens), tokenizer.sizes(array(text), tokens))


@given(TEXTS)
def test_decoding_restores_the_text(text):
    for tokenizer in (trained("bytes"), restored("bpe")):
        assert "".join(tokenizer.decode(tokenizer.encode(array(text)).tolist())) == text
    words = restored("words")
    known = words.encode(array(text)).tolist()
    decoded = "".join(words.decode(known))
    assert words.encode(array(decoded)).tolist() == known
    assert all(line == " ".join(line.split()) for line in decoded.split("\n"))


def test_decoding_yields_text_as_soon_as_its_characters_are_complete():
    assert list(trained("bytes").decode("aé€\n".encode())) == ["a", "", "é", "", "", "€", "\n", ""]
    assert list(trained("bytes").decode(b"\xe2\x82a\xff\xe2\x82")) == ["", "", "\ufffda", "\ufffd", "", "", "\ufffd"]
    words = restored("words")
    cat, mat, end, unknown = [*words.encode(array("cat mat\ndog")).tolist()[:2], 1, 0]
    assert list(words.decode([cat, mat, end, end, mat, unknown])) == ["cat", " mat", "\n", "\n", "mat", " <unk>", ""]
    assert next(words.decode([cat], after=mat)) == " cat"
    assert next(words.decode([cat], after=end)) == "cat"


def test_vocabulary_sizes():
    train = array(PROSE)
    assert trained("bytes").size == 256
    assert trained("bpe").size == 300
    assert BPE.learn(array("ab ab"), 300).size < 300, "nothing more to merge"
    counts = pd.Series([w for line in PROSE.splitlines() for w in line.split()]).value_counts()
    assert trained("words").size == len({*counts.index, "<unk>"}) + 1
    frequent = sorted(counts.index.drop("<unk>"), key=lambda word: (-counts[word], word.encode()))
    vocabulary = Tokenizer.from_str(trained("few").save()).get_vocab()
    assert sorted(vocabulary, key=vocabulary.get) == ["<unk>", "<eos>", *frequent[:7]]
    assert Words.learn(train, 10_000).size == trained("words").size
    assert [trained(n).encode(train).dtype for n in ("bytes", "bpe", "words")] == [np.uint8, np.uint16, np.uint8]


def test_training_gives_the_same_tokenizer_in_every_process():
    script = (
        "import sys, numpy; from cat.tasks.tokenizer import BPE, Words\n"
        "text = numpy.frombuffer(sys.stdin.buffer.read(), numpy.uint8)\n"
        "print(BPE.learn(text, 300).save(), Words.learn(text, 9).save())"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, input=PROSE.encode(), capture_output=True, check=True)
    assert done.stdout.decode() == f"{trained('bpe').save()} {trained('few').save()}\n"


@pytest.fixture
def source(tmp_path):
    """A text whose validation and test parts contain words that its training part does not."""
    lines = [f"Line {i} of the text , with <unk> and {'new' if i > 160 else 'old'}{i % 13} words .\n" for i in range(200)]
    path = tmp_path / "lines.txt"
    path.write_text("".join(lines))
    return path


def task(source, name, **changes):
    kinds = {"bytes": {}, "bpe": {"tokens": "bpe", "vocabulary_size": 320}, "words": {"tokens": "words"}}
    kinds["few"] = {"tokens": "words", "vocabulary_size": 12}
    sizes = {"length": 12, "multiples": (0.5, 1, 2), "train_examples": 7, "valid_examples": 5, "test_examples": 9}
    return Text(**{"kind": "text", "source": str(source), **sizes, **kinds[name], **changes})


@ALL
def test_extents_are_the_bytes_and_words_behind_the_targets(name, source):
    """Computed in another way: from decoded prefixes, and from a regular expression that finds the ends of words."""
    text = task(source, name)
    extents, saved = text.extents(), text.tokenizer()
    whole = source.read_bytes()[len(source.read_bytes()) * 9 // 10 :]
    found = list(re.finditer(rb"[^ \n]+|\n", whole))
    reader = saved and Tokenizer.from_str(saved)
    lines = whole.decode().splitlines(keepends=True)
    tokens = [i for line in lines for i in reader.encode(line).ids] if reader else list(whole)

    def offset(count):
        if name in ("words", "few"):
            return found[count - 1].end()
        return len(reader.decode(tokens[:count])) if reader else count

    targets = [text.examples("test", length, 9, generator(0, "x", "test")).targets for length in text.lengths]
    regions = [rows[rows != IGNORE].reshape(9, 12) for rows in targets]
    for i in range(9):
        before = 12 + i * (len(tokens) - 13) // 9 + 1
        after = before + 12
        assert all(region[i].tolist() == tokens[before:after] for region in regions)
        assert extents.bytes[i] == offset(after) - offset(before)
        assert extents.words[i] == sum(offset(before) < word.end() <= offset(after) for word in found)
        spelt = [word[0] for word in found[before:after]] if name in ("words", "few") else []
        known = {"<unk>", *(reader.get_vocab() if reader else ())}
        assert extents.unknown[i] == sum(len(word) for word in spelt if word != b"\n" and word.decode() not in known)
    assert (extents.unknown.sum() > 0) == (name in ("words", "few"))


def test_words_of_a_byte_text_count_where_they_end(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("ab cde\n" * 400)
    text = task(path, "bytes", length=14, multiples=(1,), test_examples=30)
    extents = text.extents()
    np.testing.assert_array_equal(extents.bytes, 7)
    np.testing.assert_array_equal(extents.words, 3)  # in every period of seven bytes: ab, cde, and the end of the line


@ALL
def test_the_data_of_a_task_include_its_tokenizer_extents_and_source_digests(name, source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = task(source, name)
    generate("text", text, 0)
    folder, heldout = DATA / "text", HELDOUT / "text"
    meta, test_meta = read_json(folder / "meta.json"), read_json(heldout / "meta.json")
    assert meta["origin"] == test_meta["origin"] == {"lines.txt": hashlib.sha256(source.read_bytes()).hexdigest()}
    assert (folder / "tokenizer.json").exists() == (name != "bytes")
    if name != "bytes":
        saved = (folder / "tokenizer.json").read_bytes()
        assert meta["tokenizer"] == hashlib.sha256(saved).hexdigest()
        assert read_meta("text").vocabulary == Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    with np.load(heldout / "extents.npz") as arrays:
        assert {key: int(arrays[key].sum()) for key in arrays} == test_meta["extents"]
    largest = [read_split("text", split).inputs.max() for split in ("valid", *test_meta["splits"])]
    assert max(*largest, next(read_training("text")).tokens.max()) < meta["vocabulary"] == text.vocabulary


def make_totals(seed, rows=5, tokens=7):
    rng = torch.Generator().manual_seed(seed)
    targets = torch.full((rows,), tokens, dtype=torch.float64)
    loss = torch.rand(rows, generator=rng, dtype=torch.float64) * 3 * tokens
    return SequenceTotals(loss, torch.ones(rows, dtype=torch.float64), targets)


def test_with_byte_tokens_the_metrics_equal_those_of_the_tokens_to_the_bit():
    totals = make_totals(0)
    extents = Extents(np.full(5, 7), np.array([1, 0, 2, 1, 3]), np.zeros(5, int))
    found, scores = metrics(totals, extents, autoregressive=False), Scores.of(totals)
    assert (found["loss"], found["perplexity"], found["bits_per_byte"]) == (scores.loss, scores.perplexity, scores.bits)
    assert found["word_perplexity"] == pytest.approx(math.exp(totals.loss.sum() / 7))


def test_with_other_tokens_bits_are_per_byte_and_perplexity_is_per_word():
    """Two tokenizers that give a text the same probability have equal bits per byte and word perplexity."""
    loss = make_totals(0).loss
    extents = Extents(np.array([20, 31, 17, 25, 22]), np.array([4, 5, 3, 6, 4]), np.zeros(5, int))
    many, few = (SequenceTotals(loss, loss, torch.full((5,), float(n), dtype=torch.float64)) for n in (11, 6))
    a, b = (metrics(totals, extents, autoregressive=False) for totals in (many, few))
    assert a["perplexity"] < b["perplexity"]
    for metric, value in (("bits_per_byte", loss.sum() / math.log(2) / 115), ("word_perplexity", math.exp(loss.sum() / 22))):
        assert a[metric] == pytest.approx(b[metric]) == pytest.approx(float(value))


def test_a_word_outside_the_vocabulary_costs_eight_bits_a_byte():
    totals, unknown = make_totals(0), np.array([0, 9, 0, 5, 0])
    extents = Extents(np.full(5, 23), np.full(5, 7), unknown)
    known_words, unknown_words = (
        metrics(totals, e, autoregressive=False) for e in (extents._replace(unknown=0 * unknown), extents)
    )
    assert unknown_words["bits_per_byte"] - known_words["bits_per_byte"] == pytest.approx(8 * 14 / 115)
    assert unknown_words["word_perplexity"] == known_words["word_perplexity"], "as in published results, in which <unk> is a word"


@pytest.mark.parametrize("unknown", [0, 3])
def test_bits_and_bytes_per_sequence_give_bits_per_byte(unknown):
    extents = Extents(np.array([20, 31, 17, 25, 22]), np.full(5, 4), np.full(5, unknown))
    bits, sizes, _ = _sequences(make_totals(1), extents, autoregressive=False)
    assert (bits * sizes).sum() / sizes.sum() == pytest.approx(
        metrics(make_totals(1), extents, autoregressive=False)["bits_per_byte"]
    )


def test_without_a_word_end_among_the_targets_the_word_perplexity_is_infinite():
    extents = Extents(np.full(5, 7), np.zeros(5, int), np.zeros(5, int))
    assert metrics(make_totals(0), extents, autoregressive=False)["word_perplexity"] == math.inf


def test_a_study_of_a_local_text_with_bpe_tokens(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_study(tmp_path, tasks=["copying", "text"])
    edit(**{"tasks.text.data.source": "lines.txt", "tasks.text.data.tokens": "bpe", "tasks.text.data.vocabulary_size": 280})
    edit(**{"tasks.text.data.test_examples": 4})
    stage("generate", "text")
    for cell in cells(load_study()):
        if cell.task == "text":
            stage("train", "text", cell.variant)
    stage("evaluate", "text")
    total = read_json(HELDOUT / "text" / "meta.json")["extents"]
    table = pd.read_csv(RESULTS / "text.csv").pivot_table(index=["variant", "seed", "length"], columns="metric", values="value")
    sums = read_scores(SCORES / "text.npz")["bits_per_byte"]
    assert len(sums) == len(table) > 6
    for key, row in table.iterrows():
        bits, sizes = sums[key]
        assert sizes.sum() == total["bytes"]
        assert bits.sum() / total["bytes"] == pytest.approx(row["bits_per_byte"], rel=2**-11)
        exact = row["bits_per_byte"] * total["bytes"]
        assert row["word_perplexity"] == pytest.approx(2 ** (exact / total["words"]), rel=1e-4)
        assert row["perplexity"] == pytest.approx(2 ** (exact / (4 * 32)), rel=1e-4)


def test_changed_sources_are_reported(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_study(tmp_path, tasks=["copying", "text"])
    edit(**{"tasks.text.data.source": "lines.txt", "tasks.text.data.test_examples": 4})
    study = load_study()
    assert list(changed_sources(study)) == []
    stage("generate", "text")
    assert list(changed_sources(study)) == []
    source.write_text(source.read_text() + "More .\n")
    (line,) = changed_sources(study)
    assert line.startswith("tasks.text.data.source: ")
    assert "dvc repro -f generate@text" in line
    result = CliRunner().invoke(main, ["validate"])
    assert (result.exit_code, result.stderr.splitlines()[0]) == (0, f"params.yaml: {line}")
    edit(**{"tasks.text.data.test_examples": 31})
    assert list(changed_sources(load_study())) == [], "DVC regenerates these data anyway"
    source.unlink()
    assert list(changed_sources(study)) == []
