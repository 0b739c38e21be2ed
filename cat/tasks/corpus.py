"""Where text comes from: a corpus by its name or its path, as the bytes of its splits, and where words end in it.

`python-docs` needs no download: it is the English prose that every Python installation carries, the docstrings of the standard
library and `pydoc_data.topics`. It is that of the interpreter in use, so its bytes depend on the Python version.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import logging
import stat
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

PYTHON_DOCS, WIKITEXT = "python-docs", "wikitext-103"
LIMIT = 4 << 30
"""Bytes of the largest split or folder that is read, since it is read whole."""


class Published(NamedTuple):
    """What is known of a split of WikiText-103."""

    words: int
    """One <eos> a line counted in."""
    sha256: str | None
    """Of wiki.<split>.tokens; that of the training split is published nowhere."""
    parquet: dict[str, int]
    """Its files on the hub, and their sizes."""


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
REPOSITORY, REVISION, PLACE = "Salesforce/wikitext", "b08601e04326c79dfdd32d625aee71d232d685c3", "wikitext-103-v1"

# Distributions split these off or leave them out; without them the corpus is the same wherever the version is.
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
_SPOILT = "it is truncated or altered; get it again, or name a text of your own as the source"
_SPACE = np.isin(np.arange(256), list(b" \t\n\r\v\f"))


@functools.cache
def read(source: str, folder: str | None, split: str) -> np.ndarray:
    """The bytes of the split `train`, `valid` or `test`, in UTF-8; WikiText-103 from `folder`, or from the hub without one.

    Raises ValueError, in words, where the text is missing, truncated, altered, too large, or cannot be fetched.
    """
    if source != WIKITEXT:
        return corpus(source)[split]
    published = WIKITEXT_103[split]
    if folder is None:
        where = f"{REPOSITORY}/{PLACE} {split}"
        text = _parquet([_fetch(name, size) for name, size in published.parquet.items()])
    else:
        path = _tokens_file(folder, split)
        where, text = str(path), _text(path)
    array = np.frombuffer(text, dtype=np.uint8)
    words = int(np.count_nonzero(ends_a_word(array)))
    if words != published.words:
        raise ValueError(f"{where}: has {words:,} words, not the {published.words:,} of WikiText-103: {_SPOILT}")
    if folder is not None and published.sha256 not in (None, hashlib.sha256(text).hexdigest()):
        raise ValueError(f"{where}: is not that of WikiText-103, whose SHA-256 is {published.sha256}: {_SPOILT}")
    return array


def digests(source: str, folder: str | None) -> dict[str, str]:
    """SHA-256 of every local file that the corpus is read from, by its name; those of the hub are pinned."""
    if source == PYTHON_DOCS or (source == WIKITEXT and folder is None):
        return {}
    if source != WIKITEXT:
        return {name: _sha256(path) for name, path in _paths(Path(source))}
    return {path.name: _sha256(path) for split in WIKITEXT_103 if (path := _tokens_file(str(folder), split))}


def ends_a_word(text: np.ndarray) -> np.ndarray:
    """Whether a word ends with each byte: words stand between white space, and the end of a line is one, <eos>."""
    space = _SPACE[text]
    last = ~space
    last[:-1] &= space[1:]
    return last | (text == ord("\n"))


@functools.cache
def corpus(source: str) -> dict[str, np.ndarray]:
    """The bytes of each split. Files go to a split by a digest of their name, 8 : 1 : 1; a single file is cut by position.

    Raises ValueError, in words, where there is no text at `source`.
    """
    files = dict(_python_docs() if source == PYTHON_DOCS else ((name, _text(path)) for name, path in _paths(Path(source))))
    splits: dict[str, list[bytes]] = {"train": [], "valid": [], "test": []}
    if len(files) == 1:
        (text,) = files.values()
        first, second = (_before_a_character(text, len(text) * tenths // 10) for tenths in (8, 9))
        splits = {"train": [text[:first]], "valid": [text[first:second]], "test": [text[second:]]}
    for name in sorted(files) if len(files) > 1 else ():
        part = hashlib.sha256(name.encode()).digest()[0] % 10
        splits[{0: "valid", 1: "test"}.get(part, "train")].append(files[name])
    return {split: np.frombuffer(b"\n\n".join(texts), dtype=np.uint8) for split, texts in splits.items()}


def _before_a_character(text: bytes, place: int) -> int:
    while place < len(text) and text[place] & 0xC0 == 0x80:  # inside a character of several bytes
        place += 1
    return place


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
    except (SyntaxError, ValueError):  # files kept broken on purpose
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text


def _paths(source: Path) -> list[tuple[str, Path]]:
    """Name and path of every file of a source, which is one itself or a folder of them."""
    if not source.is_dir():
        return [(source.name, source)]
    paths = sorted(p for p in source.rglob("*") if p.suffix in {".txt", ".md"} and p.is_file())
    if not paths:
        raise ValueError(f"{source}: no .txt or .md file in it")
    _check_size(source, sum(path.stat().st_size for path in paths))
    return [(path.relative_to(source).as_posix(), path) for path in paths]


def _text(path: Path) -> bytes:
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
    if size > LIMIT:
        raise ValueError(f"{path}: {size:,} bytes of text, more than the {LIMIT:,} that are read at once")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _tokens_file(folder: str, split: str) -> Path:
    path = Path(folder) / f"wiki.{split}.tokens"
    if not path.is_file():
        raise ValueError(f"{path}: is missing; put that split of WikiText-103 there, or leave folder out to fetch it")
    return path


def _fetch(name: str, size: int) -> Path:
    """A file of the pinned revision, from the cache of huggingface_hub or from the hub; the whole of it, as it was published."""
    from huggingface_hub import hf_hub_download

    where = f"{REPOSITORY}/{PLACE}/{name}"
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it tells of every attempt
    try:
        path = Path(hf_hub_download(REPOSITORY, f"{PLACE}/{name}", repo_type="dataset", revision=REVISION))
    except Exception as error:  # of the hub, of the network, of the disk: they have no base in common
        reason = " ".join(str(error.__cause__ or error).split()).rstrip(".")
        raise ValueError(
            f"{where}: cannot be fetched ({reason}); try again, set HF_ENDPOINT to a mirror of the hub,"
            " or put wiki.train.tokens, wiki.valid.tokens and wiki.test.tokens into a folder and name it under folder"
        ) from None
    finally:
        logger.setLevel(level)
    blob = path.resolve()  # which the cache names after the digest
    if (there := path.stat().st_size) != size:
        raise ValueError(f"{where}: has {there:,} bytes, not {size:,}: it is truncated or altered; delete {blob} and try again")
    if len(blob.name) == 64 and blob.name != _sha256(path):
        raise ValueError(f"{where}: its SHA-256 is not {blob.name[:8]}...: it is altered; delete {blob} and try again")
    return path


def _parquet(paths: list[Path]) -> bytes:
    """The rows of a split as wiki.<split>.tokens has them: on the hub, a line of nothing but a space is an empty row."""
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    text = bytearray()
    for path in paths:
        try:
            with ParquetFile(path) as file:
                for batch in file.iter_batches(batch_size=4096, columns=["text"]):  # little may unpack to much
                    text += "".join(row or " \n" for row in batch.column("text").to_pylist()).encode()
                    _check_size(path, len(text))
        except (ArrowException, KeyError) as error:
            raise ValueError(f"{path}: is no parquet file with a column of text ({' '.join(str(error).split())})") from None
    return bytes(text)
