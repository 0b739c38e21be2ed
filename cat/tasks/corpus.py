"""Text corpora, by name or path: the bytes of each split, and the ends of words.

`python-docs` needs no download. It is the English prose of the Python installation: the docstrings of the standard library and
`pydoc_data.topics`. It comes from the running interpreter, so its bytes depend on the Python version. Its validation and test
splits leave out paragraphs that have a passage of an earlier split.

`wikitext-103-valid` is WikiText-103 with little training text: the last tenth of the validation split validates, the rest trains.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import itertools
import logging
import re
import stat
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cat.tasks.local import SPLITS, check_size, digest_split, find, walk
from cat.tasks.passages import drop_shared_paragraphs

PYTHON_DOCS, WIKITEXT, WIKITEXT_VALID = "python-docs", "wikitext-103", "wikitext-103-valid"
LIMIT = 4 << 30
"""Largest split or folder in bytes: all of it is read into memory."""
_COMPARED = 64 << 20
"""Largest source in bytes whose splits are compared line by line, which takes seconds."""
_LONG = 20
"""Fewest bytes of a line that counts as a copy: shorter lines, such as headings, recur in independent texts."""


class Published(NamedTuple):
    """The published facts about a split of WikiText-103."""

    words: int
    """Includes one <eos> per line."""
    sha256: str | None
    """Of wiki.<split>.tokens; none is published for the training split."""
    parquet: dict[str, int]
    """Its files on the hub and their sizes in bytes."""


WIKITEXT_103 = {
    "train": Published(
        103_227_021, None, {"train-00000-of-00002.parquet": 155_788_327, "train-00001-of-00002.parquet": 155_928_670}
    ),
    "valid": Published(
        217_646,
        "9aee9f52d6e77de6c7751fc5e7c44287db3ec0eaf15477098acc6b93c1c4250b",
        {"validation-00000-of-00001.parquet": 655_106},
    ),
    "test": Published(
        245_569,
        "56db52eb157b1ab5c89646eef70510c1eca6e12a3bfdb99f0d6b05b4eacb75b9",
        {"test-00000-of-00001.parquet": 721_735},
    ),
}
REPOSITORY, REVISION, FOLDER = "Salesforce/wikitext", "b08601e04326c79dfdd32d625aee71d232d685c3", "wikitext-103-v1"

# Distributions package these separately or omit them. Without them, one Python version gives one corpus everywhere.
_OPTIONAL = {
    "test",
    "tests",
    "idlelib",
    "tkinter",
    "turtledemo",
    "ensurepip",
    "lib2to3",
    "distutils",
    "site-packages",
    "dist-packages",
}
_TOPICS = "pydoc_data/topics.py"
_DAMAGED = "it is truncated or altered. Fix: get it again, or set source to your own text"
_ARTICLE = re.compile(rb"\A|^(?= = [^=\n])", re.MULTILINE)
"""Where an article starts: a heading of the first level, such as ` = Robert <unk> = `."""
_SPACE = np.isin(np.arange(256), list(b" \t\n\r\v\f"))


@functools.cache
def read(source: str, folder: str | None, split: str) -> np.ndarray:
    """Read the UTF-8 bytes of the split `train`, `valid` or `test`; WikiText-103 comes from `folder` or, if None, from the hub.

    Raises ValueError if the text is missing, truncated, altered, too large, or cannot be downloaded.
    """
    if source == WIKITEXT_VALID:
        if split == "test":
            return read(WIKITEXT, folder, "test")
        whole = read(WIKITEXT, folder, "valid")
        starts = [match.start() for match in _ARTICLE.finditer(whole.tobytes())]
        cut = max(start for start in starts if start <= len(whole) * 9 // 10)
        return whole[:cut] if split == "train" else whole[cut:]
    if source != WIKITEXT:
        return corpus(source)[split]
    published = WIKITEXT_103[split]
    if folder is None:
        name = f"{REPOSITORY}/{FOLDER} {split}"
        text = _read_parquet([_download(file, size) for file, size in published.parquet.items()])
    else:
        path = _tokens_file(folder, split)
        name, text = str(path), _read_text(path)
    array = np.frombuffer(text, dtype=np.uint8)
    words = int(np.count_nonzero(ends_a_word(array)))
    if words != published.words:
        raise ValueError(f"{name}: has {words:,} words, not the {published.words:,} of WikiText-103: {_DAMAGED}")
    if folder is not None and published.sha256 not in (None, hashlib.sha256(text).hexdigest()):
        raise ValueError(f"{name}: differs from WikiText-103, whose SHA-256 is {published.sha256}: {_DAMAGED}")
    return array


def digests(source: str, folder: str | None) -> dict[str, str]:
    """SHA-256 of each local file of the corpus, by name. Files of the hub are pinned by the revision instead."""
    if source == PYTHON_DOCS or (source in {WIKITEXT, WIKITEXT_VALID} and folder is None):
        return {}
    if source not in {WIKITEXT, WIKITEXT_VALID}:
        return {name: _sha256(path) for name, path in _paths(Path(source))}
    splits = ("valid", "test") if source == WIKITEXT_VALID else WIKITEXT_103
    return {path.name: _sha256(path) for split in splits if (path := _tokens_file(str(folder), split))}


def ends_a_word(text: np.ndarray) -> np.ndarray:
    """Whether a word ends at each byte. Words are separated by white space; each line end is the word <eos>."""
    space = _SPACE[text]
    last = ~space
    last[:-1] &= space[1:]
    return last | (text == ord("\n"))


@functools.cache
def corpus(source: str) -> dict[str, np.ndarray]:
    """The bytes of each split. For `python-docs`, a digest of the name assigns each text; see `local` for files.

    Raises ValueError if there is no text at `source`, or if its files do not give three splits.
    """
    if source == PYTHON_DOCS:
        texts = dict(_python_docs())
        parts = {split: [texts[name] for name in sorted(texts) if digest_split(name) == split] for split in SPLITS}
        train, valid, test = (_join(parts[split]) for split in SPLITS)
        valid = drop_shared_paragraphs(valid, train)
        return {"train": train, "valid": valid, "test": drop_shared_paragraphs(test, np.concatenate([train, valid]))}
    found = find(Path(source), LIMIT)
    if found.rule != "position":
        return {split: _join([_read_text(found.path(name)) for name in names]) for split, names in found.files.items()}
    text = _read_text(found.path(found.files["train"][0]))
    first, second = (_character_start(text, len(text) * tenths // 10) for tenths in (8, 9))
    return {"train": _join([text[:first]]), "valid": _join([text[first:second]]), "test": _join([text[second:]])}


def report(source: str) -> list[str]:
    """List the split rule, the skipped files and the overlap of splits, for a local source. Empty for named corpora.

    Raises ValueError as `corpus` does, unless there is nothing at `source`.
    """
    if source in {PYTHON_DOCS, WIKITEXT, WIKITEXT_VALID}:
        return []
    found = find(Path(source), LIMIT)
    lines = found.report()
    if found.source.exists():
        lines += [f"{source}: {line}" for line in _overlaps(corpus(source))]
    return lines


def _overlaps(splits: dict[str, np.ndarray]) -> Iterator[str]:
    """Say how much of a split is lines that an earlier one has, too, whatever their white space: near copies of its files."""
    if sum(map(len, splits.values())) > _COMPARED:
        yield f"more than {_COMPARED >> 20} MiB, so the lines of its splits are not compared"
        return
    lines = {split: _long_lines(text.tobytes()) for split, text in splits.items()}
    for first, second in itertools.combinations(SPLITS, 2):
        known = set(lines[first])
        share = sum(map(len, filter(known.__contains__, lines[second]))) / max(len(splits[second]), 1)
        if share >= 0.01:
            yield f"splits overlap, {share:.0%} of {second} is lines that {first} has, too, apart from white space"


def _long_lines(text: bytes) -> list[bytes]:
    lines = (b" ".join(line.split()) for line in text.splitlines())
    return [line for line in lines if len(line) >= _LONG]


def _join(texts: list[bytes]) -> np.ndarray:
    return np.frombuffer(b"\n\n".join(texts), dtype=np.uint8)


def _character_start(text: bytes, offset: int) -> int:
    while offset < len(text) and text[offset] & 0xC0 == 0x80:  # inside a character of several bytes
        offset += 1
    return offset


def _python_docs() -> Iterator[tuple[str, bytes]]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in root.rglob("*.py"):
        name = path.relative_to(root).as_posix()
        if _OPTIONAL.intersection(name.split("/")) or name == _TOPICS:
            continue
        prose = "\n\n".join(_docstrings(path))
        if prose:
            yield name, prose.encode()
    from pydoc_data.topics import topics

    for title, text in topics.items():
        yield f"{_TOPICS}#{title}", text.encode()


def _docstrings(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # the standard library contains deliberately broken files
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text


def _paths(source: Path) -> list[tuple[str, Path]]:
    """Name and path of each file of a source, a single file or a folder."""
    if not source.is_dir():
        return [(source.name, source)]
    return [(name, source / name) for name in walk(source)[0]]


def _read_text(path: Path) -> bytes:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{path}: is not a file")
        _check_size(path, status.st_size)
        text = path.read_bytes()
        text.decode("utf-8")
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start} is not UTF-8") from None
    return text


def _check_size(path: Path, size: int) -> None:
    check_size(path, size, LIMIT)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _tokens_file(folder: str, split: str) -> Path:
    path = Path(folder) / f"wiki.{split}.tokens"
    if not path.is_file():
        raise ValueError(f"{path}: is missing. Fix: put this split of WikiText-103 there, or remove folder to download it")
    return path


def _download(name: str, size: int) -> Path:
    """Download a file of the pinned revision, or take it from the cache, and check its size and digest."""
    from huggingface_hub import hf_hub_download

    address = f"{REPOSITORY}/{FOLDER}/{name}"
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it logs every attempt
    try:
        path = Path(hf_hub_download(REPOSITORY, f"{FOLDER}/{name}", repo_type="dataset", revision=REVISION))
    except Exception as error:  # errors of hub, network and disk have no common base class
        reason = " ".join(str(error.__cause__ or error).split()).rstrip(".")
        raise ValueError(
            f"{address}: cannot be downloaded ({reason}). Fix: try again, set HF_ENDPOINT to a mirror of the hub,"
            " or put wiki.train.tokens, wiki.valid.tokens and wiki.test.tokens in a folder and set folder to it"
        ) from None
    finally:
        logger.setLevel(level)
    blob = path.resolve()  # the cache names it after its digest
    if (found := path.stat().st_size) != size:
        problem = f"has {found:,} bytes, not {size:,}: it is truncated or altered"
        raise ValueError(f"{address}: {problem}. Fix: delete {blob} and try again")
    if len(blob.name) == 64 and blob.name != _sha256(path):
        raise ValueError(f"{address}: its SHA-256 is not {blob.name[:8]}...: it is altered. Fix: delete {blob} and try again")
    return path


def _read_parquet(paths: list[Path]) -> bytes:
    """Read the rows of a split as in wiki.<split>.tokens. On the hub, a line that holds one space is an empty row."""
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    text = bytearray()
    for path in paths:
        try:
            with ParquetFile(path) as file:
                for batch in file.iter_batches(batch_size=4096, columns=["text"]):  # a small file may unpack to a huge text
                    text += "".join(row or " \n" for row in batch.column("text").to_pylist()).encode()
                    _check_size(path, len(text))
        except (ArrowException, KeyError) as error:
            raise ValueError(f"{path}: is not a parquet file with a column named text ({' '.join(str(error).split())})") from None
    return bytes(text)
