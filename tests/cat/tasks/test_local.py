"""Local text: names announce splits, nothing is left out silently, and equal files share a split."""

import hashlib
import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from cat.tasks import corpus as corpus_module
from cat.tasks.corpus import corpus, report
from cat.tasks.local import SPLITS, digest_split, find
from pipeline.cli import main
from tests.helpers.study import edit, tiny_study


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Make the folder `own` of files, a mapping of names to texts or names that are their own text; return a function."""
    monkeypatch.chdir(tmp_path)

    def make(files):
        for name, text in (files if isinstance(files, dict) else dict(zip(files, files, strict=True))).items():
            path = Path("own") / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        corpus.cache_clear()

    yield make
    corpus.cache_clear()


def splits_of(source="own"):
    return find(Path(source), 1 << 30).files


def refusal(call=splits_of):
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as error:
        call()
    return str(error.value)


@pytest.mark.parametrize(
    "files",
    [
        ("train.txt", "valid.txt", "test.txt"),
        ("TRAIN.TXT", "Validation.md", "Test.txt"),
        ("ptb.train.txt", "ptb.valid.txt", "ptb.test.txt"),
        ("wiki.train.tokens", "wiki.valid.tokens", "wiki.test.tokens"),
        ("train-00000-of-00010.txt", "validation-00000-of-00001.txt", "test-00001.txt"),
        ("train.en.txt", "dev.en.txt", "test.en.txt"),
        ("wiki-train.txt", "wiki_val.txt", "test_data.txt"),
        ("training.txt", "validation.txt", "testing.txt"),
        ("train.txt", "eval.txt", "test.txt"),
        ("trainset.txt", "devset.txt", "testset.txt"),
        ("myTrain.txt", "myValid.txt", "myTest.txt"),
        ("TrainData.txt", "ValidData.txt", "TestData.txt"),
        ("WIKI-TRAIN-00001-OF-00002.TXT", "WIKI-VALID-1.TXT", "WIKI-TEST-1.TXT"),
        ("train/a.txt", "valid/deep/a.txt", "test/a.txt"),
        ("train/how-to-test.md", "dev/train-fast.md", "test/a.txt"),
        ("books/train/a.txt", "books/val/a.txt", "books/test/a.txt"),
        ("train.txt", "val1.txt", "test/a.txt"),
    ],
)
def test_names_announce_the_splits(files, made):
    made(files)
    assert splits_of() == {split: [name] for split, name in zip(SPLITS, files, strict=True)}
    assert {split: bytes(text).decode() for split, text in corpus("own").items()} == dict(zip(SPLITS, files, strict=True))
    sizes = zip(SPLITS, (len(name) for name in files), strict=True)
    assert report("own") == [
        "own: file names announce the splits: " + ", ".join(f"{split} 1 file and {size} bytes" for split, size in sizes)
    ]


def test_shards_are_joined_in_order_and_files_about_the_text_are_skipped(made):
    made(["train-00001-of-00002.txt", "train-00000-of-00002.txt", "valid.txt", "test.txt", "README.md", "LICENSE.txt"])
    assert bytes(corpus("own")["train"]) == b"train-00000-of-00002.txt\n\ntrain-00001-of-00002.txt"
    assert report("own")[1:] == ["own: skips 2 (about the text: LICENSE.txt, README.md)"]


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["train.txt", "valid.txt", "test.txt", "more.txt"], "and 1 more announce a split, but more.txt does not"),
        (["test.txt", "a.txt", "b.txt"], "own: test.txt announces a split, but a.txt, b.txt do not. Fix: put"),
        (["wiki-train.txt", "wiki-test.txt", "a.txt"], "but a.txt does not. Fix:"),
        (["train.txt", "test.txt"], "own: valid would have no file: names such as train.txt announce"),
        (["test.txt"], "own: train and valid would have no file: names such as test.txt"),
        (["train/test.txt", "valid/a.txt", "test/b.txt"], "own: train/test.txt announces test and train. Fix:"),
        ({"train.txt": "a", "valid.txt": "b", "test.txt": " \n"}, "own: test would have no file: names such as train.txt announce"
         " the splits; it skips 1 (empty: test.txt). Fix: add test.txt"),
        (["a.txt", "b.txt"], "own: valid and test would have no file: a digest of the path gives each of 2 files a split. Fix:"),
        (["a.pdf", ".b.txt"], "own: contains no .txt, .md or .tokens file with text (skipped: 1 (another"),
    ],
)  # fmt: skip
def test_names_that_leave_a_split_in_doubt_are_refused(files, words, made):
    made(files)
    assert words in refusal()
    assert words in refusal(lambda: corpus("own"))
    assert words in refusal(lambda: report("own"))


NAMES = [f"doc{i:02}.txt" for i in range(40)]


def test_other_names_go_by_a_digest_of_the_path(made):
    made([*NAMES, "how-to-test.md", "unit_test.md"])
    assert splits_of() == {
        split: [name for name in [*NAMES, "how-to-test.md", "unit_test.md"] if digest_split(name) == split] for split in SPLITS
    }
    assert digest_split("doc00.txt") == {0: "valid", 1: "test"}.get(hashlib.sha256(b"doc00.txt").digest()[0] % 10, "train")
    assert report("own")[0].startswith(
        "own: no name announces a split, so a digest of the path assigns each file, 8 : 1 : 1: train "
    )


def test_everything_that_is_skipped_is_named_with_the_reason(made):
    made(NAMES)
    before = corpus("own")
    copies = {f".ipynb_checkpoints/{name[:-4]}-checkpoint.txt": name for name in NAMES}
    others = {"deep/.DS_Store": "x", "._doc01.txt": "x", "blank.md": " \n", **{f"{i}.pdf": "x" for i in range(7)}}
    made({**copies, **others})
    Path("outside").mkdir()
    Path("own/linked").symlink_to("../outside")
    Path("own/gone.txt").symlink_to("nowhere.txt")
    os.mkfifo("own/pipe.txt")
    assert {split: bytes(text) for split, text in corpus("own").items()} == {s: bytes(text) for s, text in before.items()}
    (line,) = report("own")[1:]
    assert line == (
        "own: skips 7 (another extension: 0.pdf, 1.pdf, 2.pdf, 3.pdf, 3 more), 1 (broken link: gone.txt), 1 (empty: blank.md),"
        " 3 (hidden: ._doc01.txt, .ipynb_checkpoints/, deep/.DS_Store), 1 (link to a folder: linked/), 1 (not a file: pipe.txt)"
    )


def test_equal_files_share_a_split(made):
    made({f"doc{i:03}.txt": f"text {i % 60}" for i in range(120)})
    files = splits_of()
    texts = {split: {Path("own", name).read_text() for name in names} for split, names in files.items()}
    assert sum(map(len, texts.values())) == 60
    assert sum(map(len, files.values())) == 120
    assert report("own")[1].startswith(
        "own: equal files, each group in one split: doc000.txt = doc060.txt, doc001.txt = doc061.txt,"
    )
    assert report("own")[1].endswith(", 56 more")


def test_equal_files_of_announced_splits_are_reported(made):
    made({"train/a.txt": "same", "train/b.txt": "c", **{f"test/{i}.txt": "same" for i in range(6)}, "valid.txt": "d"})
    assert report("own")[1:] == [
        "own: splits overlap, 1 text in more than one:"
        " test/0.txt (test) = test/1.txt (test) = test/2.txt (test) = test/3.txt (test) = 3 more"
    ]


@pytest.mark.parametrize("end", ["\r\n", " \n", "\n\n", "\r"])
def test_near_copies_in_several_splits_are_reported(made, end):
    lines = [f"this is sentence {i} of the text\n" for i in range(60)]
    train, valid, test = "".join(lines[:40]), "".join(lines[40:50]), "".join(lines[50:])
    made({"train.txt": train, "valid.txt": valid, "test.txt": test})
    assert report("own")[1:] == [], "independent texts"
    made({"test.txt": "".join(lines[:10]).replace("\n", end)})
    (line,) = report("own")[1:]
    assert line.startswith("own: splits overlap, ")
    assert line.endswith("% of test is lines that train has, too, apart from white space")
    made({"valid.txt": "".join(lines[:10]), "test.txt": test + lines[0].upper()})
    assert [line.split(" of ")[1] for line in report("own")[1:]] == ["valid is lines that train has, too, apart from white space"]


def test_short_lines_are_no_copies_and_a_huge_text_is_not_compared(made, monkeypatch):
    chapters = {f"{split}.txt": "Chapter one\n\n" * 9 + f"{split} text" for split in SPLITS}
    made(chapters)
    assert report("own")[1:] == []
    monkeypatch.setattr(corpus_module, "_COMPARED", 100)
    assert report("own")[1:] == ["own: more than 0 MiB, so the lines of its splits are not compared"]


def test_validate_and_generate_say_how_the_text_is_split(made, tmp_path):
    tiny_study(tmp_path, tasks=["copying", "text"])
    edit(**{"tasks.text.data.source": "own"})
    assert "params.yaml" not in CliRunner().invoke(main, ["validate"]).stderr.replace("claims", "")
    made({f"{split}.txt": f"{split} text " * 400 for split in SPLITS} | {".DS_Store": "x"})
    lines = [
        "tasks.text.data.source = own: file names announce the splits: train 1 file and 4,400 bytes, valid 1 file"
        " and 4,400 bytes, test 1 file and 4,000 bytes",
        "tasks.text.data.source = own: skips 1 (hidden: .DS_Store)",
    ]
    result = CliRunner().invoke(main, ["validate"])
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-3:-1] == lines
    result = CliRunner().invoke(main, ["generate", "text"])
    assert (result.exit_code, result.stdout.splitlines()) == (0, lines), result.stderr
    made(["more.txt"])
    result = CliRunner().invoke(main, ["validate"])
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith(
        "params.yaml: tasks.text.data.source = own: test.txt, train.txt and 1 more announce a split, but more.txt"
    )
    assert "Fix: " in line
    assert CliRunner().invoke(main, ["generate", "text"]).exit_code == 2
