"""Next-token prediction over real text, byte by byte.

The default corpus needs no download: it is the English prose that every Python installation carries, the docstrings of the
standard library and `pydoc_data.topics`. It is that of the interpreter in use, so its bytes depend on the Python version.

Test splits compare lengths fairly: the same bytes are predicted at every length, the last half of the shortest window, with
more context before them the longer the window is.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from cat.tasks.base import IGNORE, Examples, Task

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


class Text(Task):
    """Windows of a corpus. Training windows are drawn at random; validation and test windows from files of their own."""

    kind: Literal["text"]
    source: Annotated[str, Field(min_length=1)]
    """`python-docs`, or the path of a text file or of a folder of `.txt` and `.md` files, in UTF-8."""

    @model_validator(mode="after")
    def _something_is_scored(self) -> Self:
        if self.lengths[0] < 2:
            raise ValueError(f"a window of {self.lengths[0]} token has no context")
        return self

    @property
    def vocabulary(self) -> int:
        return 256

    @property
    def goal(self) -> Literal["loss"]:
        return "loss"

    def examples(self, split: str, length: int, count: int, generator: np.random.Generator) -> Examples:
        """Raises ValueError where the source has too little text for the split.

        The windows of a test split end at the same bytes at every length, whatever `generator` is.
        """
        text = corpus(self.source)[split]
        longest = self.lengths[-1] if split == "test" else length
        room = len(text) - longest
        if room < (1 if split == "train" else count):
            raise ValueError(
                f"the {split} split of {self.source} has {len(text)} bytes, too few for {count} windows of {longest} bytes"
            )
        if split == "train":
            end = longest + generator.integers(0, room, size=count)
        else:
            end = longest + np.arange(count) * room // count
        window = text[end[:, None] + np.arange(-length, 1)]
        inputs, targets = window[:, :-1], window[:, 1:].astype(np.int64)
        if split == "test":
            targets[:, : length - (self.lengths[0] + 1) // 2] = IGNORE
        return Examples(inputs, targets)


@functools.cache
def corpus(source: str) -> dict[str, np.ndarray]:
    """The bytes of each split. Files go to a split by a digest of their name, 8 : 1 : 1; a single file is cut by position.

    Raises ValueError, in words, where there is no text at `source`.
    """
    files = dict(_python_docs() if source == "python-docs" else _files(Path(source)))
    splits: dict[str, list[bytes]] = {"train": [], "valid": [], "test": []}
    if len(files) == 1:
        (text,) = files.values()
        first, second = len(text) * 8 // 10, len(text) * 9 // 10
        splits = {"train": [text[:first]], "valid": [text[first:second]], "test": [text[second:]]}
    for name in sorted(files) if len(files) > 1 else ():
        part = hashlib.sha256(name.encode()).digest()[0] % 10
        splits[{0: "valid", 1: "test"}.get(part, "train")].append(files[name])
    return {split: np.frombuffer(b"\n\n".join(texts), dtype=np.uint8) for split, texts in splits.items()}


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


def _files(source: Path) -> Iterator[tuple[str, bytes]]:
    paths = sorted(p for p in source.rglob("*") if p.suffix in {".txt", ".md"} and p.is_file()) if source.is_dir() else [source]
    for path in paths:
        try:
            text = path.read_bytes()
            text.decode("utf-8")
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: byte {error.start} is not UTF-8") from None
        yield (path.relative_to(source).as_posix() if source.is_dir() else path.name), text
    if not paths:
        raise ValueError(f"{source}: no .txt or .md file in it")
