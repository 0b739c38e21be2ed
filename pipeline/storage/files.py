"""Read and write files: atomic writes, checked reads, JSON and CSV."""

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
    """Yield a temporary sibling of `path` and rename it to `path` on success.

    The block creates a file or a folder there. The content is flushed to disk before the rename. A power cut therefore leaves
    either the old or the new file. A folder needs two renames; a power cut between them leaves neither.

    If `path` is a link, the link is replaced: its target may be an object of DVC's cache. To write the target of a link, pass
    `path.resolve()`. An OSError without a file name, such as "disk full", gets the name of `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part, backup = path.with_name(f".{path.name}.part"), path.with_name(f".{path.name}.old")
    _remove(part)
    try:
        yield part
        for file in (part, *part.rglob("*")):
            _fsync(file)
        # A rename replaces neither a folder that is not empty, nor a link by a folder.
        if path.is_dir() or (path.is_symlink() and part.is_dir()):
            _remove(backup)
            path.replace(backup)
        try:
            part.replace(path)
        except OSError:
            if os.path.lexists(backup):
                backup.replace(path)
            raise
        _remove(backup)
        _fsync(path.parent)
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise
    finally:
        _remove(part)


def _fsync(path: Path) -> None:
    """Flush `path` to disk; on Windows only files, since folders cannot be flushed there."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, content: Any) -> None:
    path.write_text(json_text(content), encoding="utf-8")


def json_text(content: Any) -> str:
    return json.dumps(content, indent=2) + "\n"


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises ValueError if it is missing or is not JSON."""
    with readable(path, "JSON"):
        return json.loads(path.read_text(encoding="utf-8"))


@contextmanager
def readable(path: Path, what: str) -> Iterator[None]:
    """Turn an error while reading `path` into a ValueError of one line with the fix.

    `what` names the expected content. OSErrors other than a missing file pass unchanged.
    """
    try:
        yield
    except FileNotFoundError:
        raise ValueError(f"{path}: is missing; run `dvc repro`") from None
    except OSError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        if "pickle" in reason:  # numpy would advise the unsafe allow_pickle=True
            reason = "Python objects in it are not loaded"
        fix = "remove it and run `dvc checkout` or `dvc repro`"
        raise ValueError(f"{path}: is not {what}, or damaged ({reason:.120}); {fix}") from None


def write_csv(path: Path, rows: Iterable[dict[str, Any]], columns: Iterable[str]) -> None:
    """Write a CSV table. Floats keep all bits; None and nan become an empty field."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(columns), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({key: "" if value != value else value for key, value in row.items()})
