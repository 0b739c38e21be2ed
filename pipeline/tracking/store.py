"""The MLflow store: find it, create it, repair its paths, load a model from it, and tell whether it is up to date."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import sqlite3
import tempfile
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlparse

from pipeline.config.outputs import STAMP_NAME
from pipeline.storage import runs
from pipeline.storage.paths import DATA, LOGS, REPORTS, RESULTS, RUNS, VERDICTS
from pipeline.tracking.database import WAIT_SECONDS, check_database, explain, find_sqlite_error

if TYPE_CHECKING:
    from cat.model import SequenceModel


STORE, ARTIFACTS = Path("mlflow.db"), Path("mlartifacts")
COMPLETE = ARTIFACTS / ".complete"
"""The fingerprint of the files and the store after the last complete synchronisation."""
LOCATIONS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "storage_location"),
)
"""Tables and columns of the store with full paths of artifacts."""
STAMP = ARTIFACTS / STAMP_NAME
"""A digest of everything that is logged, without times and places; the output of DVC's stage."""


def tracking_uri() -> str:
    # A relative path, because the full path may contain characters with a meaning in addresses, such as ? and %.
    return f"sqlite:///{STORE}" if database_path() == STORE else os.environ["MLFLOW_TRACKING_URI"]


def database_path() -> Path | None:
    """Find the SQLite file of the store; None on a server.

    It is STORE for every address of this folder's own store: relative, absolute, or with escapes.
    """
    scheme, _, path = os.environ.get("MLFLOW_TRACKING_URI", "").partition(":///")
    if not scheme:
        return STORE
    if scheme.partition("+")[0] != "sqlite" or not path:
        return None
    plain = path.removeprefix("file:").partition("?")[0]
    # Escapes and options first, as SQLAlchemy reads an address; but a folder's name may also contain % or ? itself.
    paths = [Path(unquote(plain)), Path(plain), Path(path), Path(unquote(path))]
    return STORE if STORE.resolve() in [path.resolve() for path in paths] else paths[0]


def prepare(names: Iterable[str]) -> tuple[Path | None, bool]:
    """Wait for the store, then create or repair it if it is this folder's own.

    Returns the folder for the artifacts of new experiments, which is None on a server, and whether the store is our own.
    Raises ValueError if another program keeps the store locked, or the store cannot be used.
    """
    path = database_path()
    if path is None:
        return None, False
    has_tables = path.exists() and check_database(path)
    if path != STORE:
        beside = path.resolve().parent
        # A store with `mlartifacts` beside it is that of a study.
        return beside / (ARTIFACTS.name if (beside / ARTIFACTS.name).is_dir() else "mlruns"), False
    if has_tables:
        relocate_artifacts(names)
    else:
        create_store()
    return ARTIFACTS.resolve(), True


def explain_error(error: Exception) -> str:
    """Write one line for an error of MLflow."""
    path, found = database_path(), find_sqlite_error(error)
    if path is not None and found is not None:
        return explain(path, found)
    # An error of the network has the address in it, too.
    text = _without_password(" ".join(str(error).split()))[:200]
    if "out-of-date database schema" in text:
        return f"{path or 'MLflow'}: written by an older MLflow. Fix: copy the store, then run `mlflow db upgrade {_shown_uri()}`"
    if path:
        fix = "run this again"
    elif isinstance(error, ImportError):
        fix = f"install the package of {error.name}"
    elif tracking_uri().startswith(("http://", "https://")):
        fix = "check that the server runs and MLFLOW_TRACKING_URI names it, then run this again"
    else:
        fix = f"set MLFLOW_TRACKING_URI to http://<server> or sqlite:///<file>, or remove it to log to {STORE}"
    return f"MLflow at {_shown_uri()}: {text}. Fix: {fix}"


def _shown_uri() -> str:
    return _without_password(tracking_uri())


def _without_password(text: str) -> str:
    """The text with addresses that have no name and password."""
    return re.sub(r"//[^/@\s]*@", "//", text)


def create_store() -> None:
    """Create an empty store atomically.

    MLflow creates its tables one by one and cannot continue after an interruption.
    """
    from mlflow.tracking import MlflowClient

    for leftover in Path().glob(f".{STORE.name}.*.part"):
        shutil.rmtree(leftover, ignore_errors=True)
    # A new name each time: MLflow keeps the stores of a process by their addresses.
    folder = Path(tempfile.mkdtemp(prefix=f".{STORE.name}.", suffix=".part", dir="."))
    MlflowClient(f"sqlite:///{folder / STORE.name}").search_experiments()
    (folder / STORE.name).replace(STORE)
    shutil.rmtree(folder)


def relocate_artifacts(names: Iterable[str] = ()) -> None:
    """Point the artifact paths of a copied or moved store to this folder.

    MLflow stores full paths, so those of a copy still point to the original. New runs in the experiments `names` get their
    artifacts here even if something else created the experiment. Raises ValueError if the store is unreadable.
    """
    here = ARTIFACTS.resolve().as_uri()
    try:
        # By SQL, because MLflow has no function for it.
        with closing(sqlite3.connect(STORE, timeout=WAIT_SECONDS)) as connection, connection:
            for name, location in list(connection.execute("select name, artifact_location from experiments")):
                old, _, folder = (location or "").rpartition("/")
                if old.endswith(f"/{ARTIFACTS.name}") and unquote(folder) == name and old != here:
                    for table, column in LOCATIONS:
                        is_inside = f"substr({column}, 1, {len(location)}) = ?"
                        moved = f"? || substr({column}, {len(old) + 1})"
                        connection.execute(f"update {table} set {column} = {moved} where {is_inside}", (here, location))
            for name in names:
                location = (ARTIFACTS.resolve() / name).as_uri()
                connection.execute(
                    "update experiments set artifact_location = ? where name = ? and artifact_location is not ?",
                    (location, name, location),
                )
    except sqlite3.Error as error:
        raise ValueError(explain(STORE, error)) from None


def local_path(uri: str) -> Path:
    return Path(unquote(urlparse(uri).path))


def load_run(run_id: str) -> SequenceModel:
    """Load the trained model of a seed's run, from this folder's store or MLFLOW_TRACKING_URI.

    Raises ValueError if the run does not exist or has no weights.
    """
    if database_path() == STORE and not STORE.exists():
        raise ValueError(f"{STORE}: does not exist. Fix: run `python -m pipeline track`")
    from mlflow.artifacts import download_artifacts
    from mlflow.tracking import MlflowClient

    try:
        found = MlflowClient(tracking_uri()).list_artifacts(run_id, "weights")
        if not found:
            raise ValueError(f"run {run_id} has no weights: only runs of single seeds that did not diverge have them")
        return runs.load_model(download_artifacts(f"runs:/{run_id}/{found[0].path}", tracking_uri=tracking_uri()))
    except store_errors() as error:
        raise ValueError(explain_error(error)) from None


def store_errors() -> tuple[type[Exception], ...]:
    """The errors of MLflow and of the libraries through which it reaches a store."""
    import logging

    from alembic.util import CommandError
    from google.protobuf.json_format import ParseError  # type: ignore[import-untyped]
    from mlflow.exceptions import MlflowException
    from requests import RequestException
    from sqlalchemy.exc import SQLAlchemyError

    # They log the same errors with a traceback, or once per attempt.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
    # A database has its own package, which may not be installed.
    return MlflowException, SQLAlchemyError, CommandError, ParseError, RequestException, ImportError


def folder_id() -> str:
    """Return the tag of this folder on this machine."""
    return hashlib.sha256(os.fsencode(f"{platform.node()} {Path.cwd()}")).hexdigest()[:16]


def fingerprint() -> str:
    """Compute a digest of the sizes and times of all logged files, this code and the store, and of the folder's path.

    It reads no file, so that a store that is up to date is recognised quickly.
    """
    folders = (path for folder in (RUNS, RESULTS, VERDICTS, REPORTS, LOGS) for path in folder.rglob("*"))
    code = Path(__file__).parent.glob("*.py")
    files = sorted([*folders, *DATA.glob("*/meta.json"), Path("params.yaml"), *code, STORE])
    digest = hashlib.sha256(os.environ.get("DVC_EXP_NAME", "").encode())
    for path in files:
        if path.is_file():
            status = path.stat()
            digest.update(f"{path} {status.st_size} {status.st_mtime_ns}\n".encode())
    digest.update(os.fsencode(f"{Path.cwd()} {sorted(map(str, ARTIFACTS.glob('*/*')))}"))
    return digest.hexdigest()
