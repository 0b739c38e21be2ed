"""Where the stages keep what, and how it is written: under a temporary name, renamed when it is whole."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A temporary sibling of `path`, a file or a folder to be; it replaces `path` when the block ends without an error.

    Its content is on the disk before it does, so that even a power cut leaves the one or the other; of a folder, between two
    renames, neither. What a link leads to is replaced, not the link. An OSError that names no file, as when the disk is full,
    is given the name of `path`.
    """
    name, path = path, path.resolve() if path.is_symlink() else path
    path.parent.mkdir(parents=True, exist_ok=True)
    part, old = path.with_name(f".{path.name}.part"), path.with_name(f".{path.name}.old")
    _remove(part)
    try:
        yield part
        for file in (part, *part.rglob("*")):
            _settle(file)
        if path.is_dir():  # nothing takes the place of a folder that has something in it
            _remove(old)
            path.replace(old)
        try:
            part.replace(path)
        except OSError:
            if old.exists():
                old.replace(path)
            raise
        _remove(old)
        _settle(path.parent)
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(name)
        raise
    finally:
        _remove(part)


def _settle(path: Path) -> None:
    """Waits until it is on the disk; Windows can do so with files alone."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """The digest of a file, which is not read into memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Raises ValueError where there is no such file, or something else in it."""
    with readable(path, "JSON"):
        return json.loads(path.read_text(encoding="utf-8"))


@contextmanager
def readable(path: Path, what: str) -> Iterator[None]:
    """Errors in reading `path` as `what` it should be become a ValueError of one line that says what to do."""
    try:
        yield
    except FileNotFoundError:
        raise ValueError(f"{path}: is missing; run `dvc repro`") from None
    except OSError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        if "pickle" in reason:  # numpy's advice is to trust it
            reason = "Python objects in it are not loaded"
        remedy = "remove it and run `dvc checkout` or `dvc repro`"
        raise ValueError(f"{path}: is not {what}, or damaged ({reason:.120}); {remedy}") from None


def write_csv(path: Path, rows: Iterable[dict[str, Any]], columns: Iterable[str]) -> None:
    """Numbers are written so that reading them back gives the same bits; None and nan as an empty field."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(columns), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({key: "" if value != value else value for key, value in row.items()})
