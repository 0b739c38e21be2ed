"""The runs of MLflow that show a training in progress (pipeline/tracking/live.py): find them, and end killed ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipeline.storage.live import is_training, live_paths
from pipeline.tracking.pages import FOLDER_TAG, LIVE, Pages
from pipeline.tracking.store import STORE, database_path, folder_id

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient


def live_runs(client: MlflowClient, pages: Pages) -> list[Any]:
    """Find the live runs of this folder and DVC experiment."""
    search = f"tags.kind = '{LIVE}' and {pages.context}"
    if database_path() != STORE:
        search += f" and tags.{FOLDER_TAG} = '{folder_id()}'"
    return list(client.search_runs(list(pages.experiment_ids.values()), search, max_results=1000))


def end_killed(client: MlflowClient, pages: Pages) -> None:
    """End the live runs whose process was killed."""
    for run in live_runs(client, pages):
        if run.info.status == "RUNNING" and not in_training(run):
            client.set_terminated(run.info.run_id, "KILLED")


def in_training(run: Any) -> bool:
    """Whether a process of this folder still trains the cell of a live run."""
    tags = run.data.tags
    return any(path.parts[-3:-1] == (tags["task"], tags["variant"]) and is_training(path) for path in live_paths())
