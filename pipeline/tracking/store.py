"""The MLflow store on disk: create it, repair its paths, load a model from it, and tell whether it is up to date."""

from __future__ import annotations

import hashlib
import os
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlparse

from pipeline.storage import runs
from pipeline.storage.paths import DATA, LOGS, REPORTS, RESULTS, RUNS, VERDICTS

if TYPE_CHECKING:
    from cat.model import SequenceModel


STORE, ARTIFACTS = Path("mlflow.db"), Path("mlartifacts")
COMPLETE = ARTIFACTS / ".complete"
"""The fingerprint of the files and the store after the last complete synchronisation."""
STAMP = ARTIFACTS / "stamp"
"""A digest of everything that is logged, without times and places; the output of DVC's stage."""


def tracking_uri() -> str:
    # A relative path, because the full path may contain characters with a meaning in addresses, such as ? and %.
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{STORE}"


def create_store() -> None:
    """Create an empty store atomically.

    MLflow creates its tables one by one and cannot continue after an interruption.
    """
    from mlflow.tracking import MlflowClient

    folder = STORE.with_name(f".{STORE.name}.part")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    MlflowClient(f"sqlite:///{folder / STORE.name}").search_experiments()
    (folder / STORE.name).replace(STORE)
    shutil.rmtree(folder)


def relocate_artifacts() -> None:
    """Point the artifact paths of a copied or moved store to this folder.

    MLflow stores full paths, so those of a copy still point to the original. Raises ValueError if the store is unreadable.
    """
    here = ARTIFACTS.resolve().as_uri()
    try:
        # By SQL, because MLflow has no function for it.
        with closing(sqlite3.connect(STORE)) as connection, connection:
            for name, location in list(connection.execute("select name, artifact_location from experiments")):
                old, _, folder = location.rpartition("/")
                if old.endswith(f"/{ARTIFACTS.name}") and unquote(folder) == name and old != here:
                    for table, column in (("experiments", "artifact_location"), ("runs", "artifact_uri")):
                        is_inside = f"substr({column}, 1, {len(location)}) = ?"
                        moved = f"? || substr({column}, {len(old) + 1})"
                        connection.execute(f"update {table} set {column} = {moved} where {is_inside}", (here, location))
    except sqlite3.DatabaseError as error:
        raise ValueError(f"{STORE}: {error}. Fix: delete {STORE} and {ARTIFACTS}; they are rebuilt") from None


def local_path(uri: str) -> Path:
    return Path(unquote(urlparse(uri).path))


def load_run(run_id: str) -> SequenceModel:
    """Load the trained model of a seed's run, from this folder's store or MLFLOW_TRACKING_URI.

    Raises ValueError if the run does not exist or has no weights.
    """
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    try:
        found = MlflowClient(tracking_uri()).list_artifacts(run_id, "weights")
        if not found:
            raise ValueError(f"run {run_id} has no weights: only runs of single seeds that did not diverge have them")
        return runs.load_model(download_artifacts(f"runs:/{run_id}/{found[0].path}", tracking_uri=tracking_uri()))
    except MlflowException as error:
        raise ValueError(f"MLflow at {tracking_uri()}: {' '.join(str(error).split())[:200]}") from None


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
