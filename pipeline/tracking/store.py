"""The MLflow store of this folder."""

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
"""What the files and the store looked like when the store was complete."""
STAMP = ARTIFACTS / "stamp"
"""A digest of all that is logged, whenever and wherever that was trained."""


def create_store() -> None:
    """A store without runs, whole or not at all: MLflow makes its tables one by one, and cannot go on where that was ended."""
    from mlflow.tracking import MlflowClient

    folder = STORE.with_name(f".{STORE.name}.part")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    MlflowClient(f"sqlite:///{folder / STORE.name}").search_experiments()
    (folder / STORE.name).replace(STORE)
    shutil.rmtree(folder)


def relocate_artifacts() -> None:
    """MLflow keeps the full paths of artifacts: in a store that was copied or moved they lead to the folder where it was.

    Raises ValueError where the store cannot be read.
    """
    here = ARTIFACTS.resolve().as_uri()
    try:
        # Not by MLflow, which has no way to do it.
        with closing(sqlite3.connect(STORE)) as opened, opened:
            for name, place in list(opened.execute("select name, artifact_location from experiments")):
                there, _, folder = place.rpartition("/")
                if there.endswith(f"/{ARTIFACTS.name}") and unquote(folder) == name and there != here:
                    for table, column in (("experiments", "artifact_location"), ("runs", "artifact_uri")):
                        inside = f"substr({column}, 1, {len(place)}) = ?"
                        moved = f"? || substr({column}, {len(there) + 1})"
                        opened.execute(f"update {table} set {column} = {moved} where {inside}", (here, place))
    except sqlite3.DatabaseError as error:
        raise ValueError(f"{STORE}: {error}; without it and {ARTIFACTS} it is built again") from None


def local_path(uri: str) -> Path:
    """The folder on this machine that MLflow calls so."""
    return Path(unquote(urlparse(uri).path))


def load_run(run_id: str) -> SequenceModel:
    """The trained model of a seed's run in the store of this folder, or that of MLFLOW_TRACKING_URI.

    Raises ValueError where there is no such run, or it has no weights.
    """
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    try:
        found = MlflowClient(tracking_uri()).list_artifacts(run_id, "weights")
        if not found:
            raise ValueError(f"run {run_id} has no weights: they are in the runs of single seeds that did not diverge")
        return runs.load_model(download_artifacts(f"runs:/{run_id}/{found[0].path}", tracking_uri=tracking_uri()))
    except MlflowException as error:
        raise ValueError(f"MLflow at {tracking_uri()}: {' '.join(str(error).split())[:200]}") from None


def tracking_uri() -> str:
    # A relative path: in that of the folder there may be signs that mean something in an address, such as ? and %.
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{STORE}"


def fingerprint() -> str:
    """A digest of the names, sizes and times of all that is logged, of what logs it, and of the store; of where all this is."""
    folders = (path for folder in (RUNS, RESULTS, VERDICTS, REPORTS, LOGS) for path in folder.rglob("*"))
    files = sorted([*folders, *DATA.glob("*/meta.json"), Path("params.yaml"), Path(__file__), STORE])
    digest = hashlib.sha256(os.environ.get("DVC_EXP_NAME", "").encode())
    for path in files:
        if path.is_file():
            about = path.stat()
            digest.update(f"{path} {about.st_size} {about.st_mtime_ns}\n".encode())
    digest.update(os.fsencode(f"{Path.cwd()} {sorted(map(str, ARTIFACTS.glob('*/*')))}"))
    return digest.hexdigest()
