"""Corpora: WikiText-103 from a folder and from the hub, and local text. Every problem is one line."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from cat.tasks import corpus as corpora
from cat.tasks.corpus import FOLDER, REPOSITORY, REVISION, WIKITEXT_103, Published, corpus, digests, ends_a_word, read
from cat.tasks.text import Text
from pipeline.stages.generate import generate
from pipeline.storage.paths import DATA, HELDOUT
from tests.helpers.hub import serving
from tests.helpers.study import ROOT

SPLITS = ("train", "valid", "test")


def wiki(seed, lines):
    """Lines as in WikiText: a space at both ends; some lines are only a space."""
    rng = np.random.Generator(np.random.PCG64(seed))
    words = ["the", "<unk>", "@-@", "naïve", "=", ",", "1999", "ñandú"]
    rows = [" " + "".join(f"{words[i]} " for i in rng.integers(0, len(words), size=rng.integers(0, 9))) for _ in range(lines)]
    return [f"{row}\n" for row in rows]


ROWS = {"train": wiki(0, 211), "valid": wiki(1, 31), "test": wiki(2, 41)}
TEXT = {split: "".join(rows).encode() for split, rows in ROWS.items()}
WORDS = {split: sum(len(row.split()) + 1 for row in rows) for split, rows in ROWS.items()}


def parquet(rows, folder):
    """A file of the hub, where a line that is only a space is an empty row."""
    path = folder / "made.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": [row if row.strip() else "" for row in rows]}), path)
    return path.read_bytes()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The content of each file on the hub; the training split has two files."""
    folder = tmp_path_factory.mktemp("parquet")
    first, second = WIKITEXT_103["train"].parquet
    (valid,), (test,) = WIKITEXT_103["valid"].parquet, WIKITEXT_103["test"].parquet
    rows = {first: ROWS["train"][:100], second: ROWS["train"][100:], valid: ROWS["valid"], test: ROWS["test"]}
    return {name: parquet(content, folder) for name, content in rows.items()}


@pytest.fixture(autouse=True)
def published(files, monkeypatch):
    """Replace the published facts by those of this small corpus."""
    small = {
        split: Published(
            WORDS[split],
            None if split == "train" else hashlib.sha256(TEXT[split]).hexdigest(),
            {name: len(files[name]) for name in WIKITEXT_103[split].parquet},
        )
        for split in SPLITS
    }
    monkeypatch.setattr(corpora, "WIKITEXT_103", small)
    read.cache_clear()
    yield small
    read.cache_clear()


@pytest.fixture
def folder(tmp_path):
    for split, text in TEXT.items():
        (tmp_path / f"wiki.{split}.tokens").write_bytes(text)
    return tmp_path


def error_of(call, *arguments):
    """The ValueError of a call, which must be one line."""
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as error:
        call(*arguments)
    return str(error.value)


def test_a_folder_gives_the_splits_of_the_data_set(folder):
    for split in SPLITS:
        text = read("wikitext-103", str(folder), split)
        assert bytes(text) == TEXT[split]
        assert ends_a_word(text).sum() == WORDS[split]


def test_the_validation_split_may_train_and_is_cut_before_an_article(folder):
    (folder / "wiki.train.tokens").unlink()
    train, valid, test = (bytes(read("wikitext-103-valid", str(folder), split)) for split in SPLITS)
    assert (train + valid, test) == (TEXT["valid"], TEXT["test"])
    lines = TEXT["valid"].splitlines(keepends=True)
    articles = [i for i, line in enumerate(lines) if line.startswith(b" = ") and line[3:4] not in b"=\n"]
    starts = [len(b"".join(lines[:i])) for i in articles]
    assert 0 < len(train) == max(start for start in starts if start <= 0.9 * len(TEXT["valid"]))
    assert set(digests("wikitext-103-valid", str(folder))) == {"wiki.valid.tokens", "wiki.test.tokens"}


@pytest.mark.skipif("WIKITEXT_103" not in os.environ, reason="WIKITEXT_103 names no folder of the real data set")
@pytest.mark.parametrize(("split", "words"), [("valid", 217_646), ("test", 245_569), ("train", 103_227_021)])
def test_the_real_splits_have_the_published_number_of_words(split, words, monkeypatch):
    monkeypatch.setattr(corpora, "WIKITEXT_103", WIKITEXT_103)
    path = Path(os.environ["WIKITEXT_103"])
    if not (path / f"wiki.{split}.tokens").exists():
        pytest.skip(f"{path} has no {split} split")
    assert ends_a_word(read("wikitext-103", str(path), split)).sum() == words


@pytest.mark.parametrize("text", ["", "\n", "a", " a", "a\n\n b\tc \r\n", " = ñ = \n \n \u00a0x\u3000y"])
def test_words_are_separated_by_white_space_and_each_line_end_is_a_word(text):
    data = text.encode()
    naive = [word for line in data.splitlines(keepends=True) for word in line.replace(b"\n", b" <eos>").split()]
    ends = np.flatnonzero(ends_a_word(np.frombuffer(data, np.uint8))) + 1
    assert [data[:end].split()[-1:] for end in ends if data[end - 1 : end] != b"\n"] == [[w] for w in naive if w != b"<eos>"]
    assert len(ends) == len(naive)


def missing(path):
    path.unlink()
    return f"{path}: is missing"


def truncated(path):
    path.write_bytes(path.read_bytes()[:300])
    return f"{path}: has {WORDS_OF_300} words, not the {WORDS['valid']} of WikiText-103: it is truncated or altered"


WORDS_OF_300 = len(TEXT["valid"][:300].split()) + TEXT["valid"][:300].count(b"\n")


def altered(path):
    path.write_bytes(path.read_bytes().replace(b"1999", b"1998", 1))
    return f"{path}: differs from WikiText-103, whose SHA-256 is {hashlib.sha256(TEXT['valid']).hexdigest()}"


def latin(path):
    path.write_bytes(path.read_bytes().decode().encode("latin-1"))
    text = TEXT["valid"].decode().encode("latin-1")
    return f"{path}: byte {min(text.find(letter.encode('latin-1')) for letter in 'ïñ')} is not UTF-8"


def huge(path):
    path.write_bytes(path.read_bytes() * 10)
    corpora.LIMIT = 5000
    return f"{path}: has {10 * len(TEXT['valid']):,} bytes of text, more than the limit of 5,000"


@pytest.mark.parametrize("damage", [missing, truncated, altered, latin, huge])
def test_a_damaged_split_is_refused_in_one_line_and_nothing_is_written(damage, folder, monkeypatch):
    monkeypatch.setattr(corpora, "LIMIT", corpora.LIMIT)  # restores it after `huge`
    monkeypatch.chdir(folder)
    message = damage(folder / "wiki.valid.tokens")
    task = Text(
        kind="text",
        source="wikitext-103",
        folder=str(folder),
        length=8,
        multiples=(1,),
        train_examples=3,
        valid_examples=3,
        test_examples=3,
        tokens="words",
    )
    assert error_of(generate, "wiki", task, 0).startswith(message)
    assert [*DATA.rglob("*"), *HELDOUT.rglob("*")] == []


def fetch(hub, home, *splits, **environment):
    """Read `splits` in a new process that gets its settings from the environment. Returns the texts or the error line."""
    script = (
        "import sys, json, time; time.sleep = lambda seconds: None\n"
        "from cat.tasks import corpus as corpora\n"
        "from huggingface_hub import constants; constants.DOWNLOAD_CHUNK_SIZE = 64\n"  # the granularity at which it resumes
        "table = json.loads(sys.argv[1])\n"
        "corpora.WIKITEXT_103 = {split: corpora.Published(*row) for split, row in table.items()}\n"
        "try: [sys.stdout.buffer.write(bytes(corpora.read('wikitext-103', None, split))) for split in sys.argv[2:]]\n"
        "except ValueError as error: sys.exit(str(error))\n"
    )
    url = hub if isinstance(hub, str) else hub.url
    settings = {"PYTHONPATH": str(ROOT), "HF_HOME": str(home), "HF_ENDPOINT": url, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    clean = {key: value for key, value in os.environ.items() if not key.upper().startswith("HF_")}
    command = [sys.executable, "-c", script, json.dumps(corpora.WIKITEXT_103), *splits]
    done = subprocess.run(command, env=clean | settings | environment, capture_output=True, timeout=60)
    assert bool(done.returncode) == bool(done.stderr), done.stderr
    if done.returncode == 0:
        return done.stdout
    (line,) = done.stderr.decode().splitlines()
    return line


def url_path(name):
    return f"/datasets/{REPOSITORY}/resolve/{REVISION}/{FOLDER}/{name}"


@pytest.fixture
def hub(files):
    with serving({url_path(name): content for name, content in files.items()}, REVISION) as hub:
        yield hub


TEST = next(iter(WIKITEXT_103["test"].parquet))


def test_the_hub_gives_the_same_text_as_a_folder_and_is_contacted_once(hub, tmp_path):
    assert fetch(hub, tmp_path, *SPLITS) == b"".join(TEXT.values())
    assert {path for _, path, _ in hub.requests} == set(hub.files)
    hub.requests.clear()
    assert fetch(hub, tmp_path, *SPLITS, HF_HUB_OFFLINE="1") == b"".join(TEXT.values())
    assert hub.requests == []


def test_a_cut_download_resumes_where_it_ended(hub, tmp_path):
    hub.responses_to_cut = 1
    assert fetch(hub, tmp_path, "test") == TEXT["test"]
    half = len(hub.files[url_path(TEST)]) // 2 // 64 * 64
    assert [byte_range for method, _, byte_range in hub.requests if method == "GET"] == [None, f"bytes={half}-"]


FIX = "Fix: try again, set HF_ENDPOINT to a mirror of the hub, or put wiki.train.tokens, wiki.valid.tokens and"


@pytest.mark.parametrize(
    ("settings", "reason"),
    [({"HF_HUB_OFFLINE": "1"}, "offline mode is enabled"), ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "Connection refused")],
)
def test_without_a_network_one_line_says_how_to_fix_it(settings, reason, hub, tmp_path):
    line = fetch(hub, tmp_path, "test", **settings)
    assert line.startswith(f"{REPOSITORY}/{FOLDER}/{TEST}: cannot be downloaded (")
    assert reason in line
    assert FIX in line
    assert hub.requests == []
    assert not list(tmp_path.rglob("*.incomplete"))


def test_a_file_missing_on_the_hub_is_named(hub, tmp_path):
    del hub.files[url_path(TEST)]
    line = fetch(hub, tmp_path, "test")
    assert line.startswith(f"{REPOSITORY}/{FOLDER}/{TEST}: cannot be downloaded (")
    assert "404 Not Found" in line
    assert FIX in line


def test_a_file_of_another_size_or_digest_is_refused(hub, tmp_path):
    content = hub.files[url_path(TEST)]
    hub.files[url_path(TEST)] = content[:-4] + b"PAR2"
    line = fetch(hub, tmp_path / "a", "test")
    digest = hashlib.sha256(content).hexdigest()
    assert line.startswith(f"{REPOSITORY}/{FOLDER}/{TEST}: its SHA-256 is not {digest[:8]}...: it is altered. Fix: delete ")
    hub.files[url_path(TEST)] = content[:-1]
    line = fetch(hub, tmp_path / "b", "test")
    assert f"{TEST}: has {len(content) - 1:,} bytes, not {len(content):,}: it is truncated or altered. Fix: delete " in line


def test_a_damaged_cache_is_detected_and_downloaded_again_after_deletion(hub, tmp_path):
    fetch(hub, tmp_path, "test")
    digest = hashlib.sha256(hub.files[url_path(TEST)]).hexdigest()
    (blob,) = tmp_path.rglob(digest)
    content = bytearray(blob.read_bytes())
    content[40] ^= 1
    blob.write_bytes(content)
    line = fetch(hub, tmp_path, "test", HF_HUB_OFFLINE="1")
    assert line.endswith(f"it is altered. Fix: delete {blob} and try again")
    blob.unlink()
    assert fetch(hub, tmp_path, "test") == TEXT["test"]


def test_an_invalid_or_too_large_parquet_file_is_refused_before_all_of_it_is_read(tmp_path, monkeypatch):
    path = tmp_path / "x.parquet"
    path.write_bytes(b"no parquet")
    assert error_of(corpora._read_parquet, [path]).startswith(f"{path}: is not a parquet file with a column named text (")
    pyarrow.parquet.write_table(pyarrow.table({"words": ["a"]}), path)
    assert error_of(corpora._read_parquet, [path]).startswith(f"{path}: is not a parquet file with a column named text (")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a" * 1000] * 9000}), path)
    monkeypatch.setattr(corpora, "LIMIT", 100_000)
    assert path.stat().st_size < corpora.LIMIT
    assert error_of(corpora._read_parquet, [path]) == f"{path}: has 4,096,000 bytes of text, more than the limit of 100,000"


def test_a_too_large_folder_and_a_device_are_refused(tmp_path, monkeypatch):
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text("x" * 40)
    monkeypatch.setattr(corpora, "LIMIT", 100)
    assert error_of(corpus, str(tmp_path)) == f"{tmp_path}: has 120 bytes of text, more than the limit of 100"
    assert error_of(corpus, "/dev/null") == "/dev/null: is not a file"


def test_a_single_file_is_cut_between_characters(tmp_path):
    inside = set()
    for count in range(40, 60):
        text = "ab€" * count + "x" * (count % 7)
        (tmp_path / "one.txt").write_text(text, encoding="utf-8")
        corpus.cache_clear()
        splits = corpus(str(tmp_path / "one.txt"))
        assert "".join(bytes(splits[split]).decode() for split in SPLITS) == text
        inside.add(text.encode()[len(text.encode()) * 8 // 10] & 0xC0 == 0x80)
    assert inside == {True, False}, "the cut must fall inside and between characters"


def test_the_digests_are_those_of_the_files(folder):
    sums = {f"wiki.{split}.tokens": hashlib.sha256(text).hexdigest() for split, text in TEXT.items()}
    assert digests("wikitext-103", str(folder)) == digests(str(folder), None) == sums
    for split in SPLITS:
        (folder / f"wiki.{split}.tokens").unlink()
    (folder / "deep").mkdir()
    (folder / "deep" / "a.md").write_bytes(b"a")
    (folder / "b.txt").write_bytes(b"b")
    assert digests(str(folder), None) == {
        "b.txt": hashlib.sha256(b"b").hexdigest(),
        "deep/a.md": hashlib.sha256(b"a").hexdigest(),
    }
    assert digests(str(folder / "b.txt"), None) == {"b.txt": hashlib.sha256(b"b").hexdigest()}
    assert digests("python-docs", None) == digests("wikitext-103", None) == digests("wikitext-103-valid", None) == {}
