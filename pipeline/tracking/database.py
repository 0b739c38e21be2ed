"""The SQLite file of an MLflow store: wait for other programs, check it, and explain its errors."""

from __future__ import annotations

import sqlite3
import sys
import time
from contextlib import closing
from pathlib import Path

WAIT_SECONDS = 30.0
"""How long to wait for a program that locks the store. MLflow itself waits 20 s."""
_LOCKED = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}
_DENIED = {sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM, sqlite3.SQLITE_AUTH}
_OTHER_TABLES = {sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CONSTRAINT, sqlite3.SQLITE_MISMATCH}
_DAMAGED = {sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT}


def check_database(path: Path) -> bool:
    """Wait until no other program locks the file; return whether it has tables.

    Raises ValueError if the file stays locked, or is no store of this version of MLflow.
    """
    if path.is_dir():
        raise ValueError(f"{path}: is a folder, not a file. Fix: move it away; the next run makes a new store")
    try:
        _wait(path)
        with closing(sqlite3.connect(path, timeout=WAIT_SECONDS)) as connection:
            tables = {name for (name,) in connection.execute("select name from sqlite_master where type = 'table'")}
            versioned = "alembic_version" in tables
            versions = list(connection.execute("select version_num from alembic_version")) if versioned else []
    except sqlite3.Error as error:
        raise ValueError(explain(path, error)) from None
    if not tables:
        return False
    if "experiments" not in tables or not versions:
        raise ValueError(f"{path}: no complete store of MLflow. Fix: move the file away; the next run makes a new store")
    if not all(_is_known(str(version)) for (version,) in versions):
        raise ValueError(f"{path}: written by a newer MLflow. Fix: install that version of MLflow, or move the store away")
    return True


def _wait(path: Path) -> None:
    end = time.monotonic() + WAIT_SECONDS
    told = False
    while True:
        try:
            # Short waits, because Ctrl-C has no effect during one. `exclusive` also finds programs that only read.
            with closing(sqlite3.connect(path, timeout=0.5, isolation_level=None)) as connection:
                connection.execute("begin exclusive")
                connection.execute("rollback")
            return
        except sqlite3.Error as error:
            if not is_locked(error) or time.monotonic() > end:
                raise
        if not told:
            print(f"{path}: in use by another program; waiting up to {WAIT_SECONDS:g} s", file=sys.stderr, flush=True)
            told = True


def _is_known(version: str) -> bool:
    """Whether the installed MLflow has a migration to this version of the schema."""
    import mlflow

    folder = Path(mlflow.__file__).parent / "store" / "db_migrations" / "versions"
    return any(path.name.startswith(version) for path in folder.glob("*.py"))


def find_sqlite_error(error: BaseException | None) -> sqlite3.Error | None:
    """Find SQLite's error among the causes of an error of SQLAlchemy or MLflow."""
    while error is not None:
        for candidate in (error, getattr(error, "orig", None)):
            if isinstance(candidate, sqlite3.Error):
                return candidate
        error = error.__cause__ or error.__context__
    return None


def is_locked(error: sqlite3.Error) -> bool:
    return _code(error) in _LOCKED


def explain(path: Path, error: sqlite3.Error) -> str:
    """Write the line for an error. A store is called damaged only if SQLite cannot read it."""
    if is_locked(error):
        return f"{path}: in use by another program. Fix: stop that program, or run this again later; the store is intact"
    if _code(error) == sqlite3.SQLITE_FULL:
        return f"{path}: {error}. Fix: free space on the disk, then run this again; the store is intact"
    if _code(error) in _DENIED:
        return f"{path}: {error}. Fix: allow this user to write the file and its folder; the store is intact"
    if _is_damaged(path):
        return f"{path}: {error}: the store is damaged. Fix: move the file and its artifacts away; the next run makes a new store"
    if _code(error) in _OTHER_TABLES:
        fix = "move the file and its artifacts away, and keep them; the next run makes a new store"
        return f"{path}: {error}: another program changed the tables of the store. Fix: {fix}"
    return f"{path}: {error}. Fix: check the disk and its free space, then run this again; keep the store"


def _code(error: sqlite3.Error) -> int:
    # The lowest byte is the kind of the error; the others say more about it.
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def _is_damaged(path: Path) -> bool:
    if not path.is_file():
        return False
    try:
        with closing(sqlite3.connect(path, timeout=WAIT_SECONDS)) as connection:
            return bool(connection.execute("pragma quick_check").fetchone() != ("ok",))
    except sqlite3.Error as error:
        return _code(error) in _DAMAGED
