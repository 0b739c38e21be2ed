"""Bring the MLflow store into agreement with the files of the study.

A task is an experiment, a variant is a run, and the runs of its seeds are inside it. The report has a run of its own.

A run is found by a digest of everything that is logged in it. Existing runs stay, missing runs are logged. So the store can be
deleted, and a second call changes nothing. A run that no longer matches the files stays as part of an older study: tags say
which studies a run belongs to, and whether it is current. Runs under `dvc exp run` get the experiment's name; they and the runs
of the workspace leave each other alone. Results that the workspace has as runs are not logged again for an experiment.
Under `dvc exp run --temp` or `--queue` the store is in DVC's temporary folder and is lost with it, unless MLFLOW_TRACKING_URI
names another store.

A local store that is up to date is recognised by the sizes and times of its files. A store that was copied or moved with its
folder gets the new paths of its artifacts. DVC cannot compare stores, so its stage has a digest of what is logged as output.

Runs in training have a kind of their own (pipeline/tracking/live.py) and are deleted once their cell is not in training.

Several folders may log to one server. There, a run has a tag for the folder that logged it. Another folder reuses a run with the
same content, but never deletes it.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline.config.grid import variants_on
from pipeline.config.outputs import REPORT_EXPERIMENT
from pipeline.config.study import Study
from pipeline.storage.files import atomic_write
from pipeline.tracking.database import find_sqlite_error, is_locked
from pipeline.tracking.pages import (
    CONTEXT_TAG,
    FOLDER_TAG,
    KEY_TAG,
    NOTE_TAG,
    VIEW_PREFIX,
    VIEW_TAG,
    Pages,
    context_filter,
    context_tag,
    runs_address,
)
from pipeline.tracking.records import Record, report_record, task_records
from pipeline.tracking.store import (
    COMPLETE,
    STAMP,
    STORE,
    database_path,
    explain_error,
    fingerprint,
    folder_id,
    local_path,
    prepare,
    store_errors,
    tracking_uri,
)
from pipeline.tracking.training_runs import end_killed, in_training, live_runs

if TYPE_CHECKING:
    from mlflow.entities import Experiment, Run
    from mlflow.tracking import MlflowClient

T = TypeVar("T")


def track(study: Study, *, prune: bool = False) -> None:
    """Bring the store up to date; `prune` deletes the runs of older studies.

    Raises ValueError if a result is missing or the store cannot be reached.
    """
    local = database_path() == STORE
    if local and not prune and STAMP.exists() and COMPLETE.exists() and COMPLETE.read_text(encoding="utf-8") == fingerprint():
        return
    records = {record.key: record for record in [report_record(study), *task_records(study)]}

    _sync_when_free(study, records, prune=prune)
    with atomic_write(STAMP) as path:
        digests = sorted(record.content_digest for record in records.values())
        path.write_text(hashlib.sha256("".join(digests).encode()).hexdigest() + "\n", encoding="utf-8")
    if local:
        with atomic_write(COMPLETE) as path:
            path.write_text(fingerprint(), encoding="utf-8")


def addresses(study: Study, server: str) -> Iterator[str]:
    """Describe the experiments, and yield a line with the address of the index of tasks and of each task's best variants.

    Results may be missing. Raises ValueError if the store cannot be reached.
    """
    try:
        client, pages, _ = connect(study)
        end_killed(client, pages)
        for name, experiment_id in pages.experiment_ids.items():
            _describe(client, experiment_id, name, pages)
    except store_errors() as error:
        raise ValueError(explain_error(error)) from None
    yield f"all tasks: {server}/{runs_address(pages.experiment_ids[REPORT_EXPERIMENT])}"
    for task in pages.tasks:
        yield f"{task}: {server}/{pages.view_address(task, pages.views(task)[0])}"


def connect(study: Study) -> tuple[MlflowClient, Pages, Path | None]:
    """Open the store and its experiments; the path is the folder of artifacts if the store is this folder's own."""
    set_environment()
    from mlflow.tracking import MlflowClient

    names = [REPORT_EXPERIMENT, *(task for task in study.tasks if variants_on(study, task))]
    location, own = prepare(names)
    client = MlflowClient(tracking_uri())
    experiment_ids = {name: _shared(_get_experiment, client, name, location).experiment_id for name in names}
    return client, Pages(study, experiment_ids, os.environ.get("DVC_EXP_NAME", "")), location if own else None


def set_environment() -> None:
    """Set how long MLflow tries to reach a server, and that it prints no address per run, unless the user did."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")


def _sync_when_free(study: Study, records: Mapping[str, Record], *, prune: bool) -> None:
    """Synchronise; start again if another program locks the store meanwhile, because nothing is logged twice."""
    caught = store_errors()
    for attempts_left in (2, 1, 0):
        try:
            client, pages, artifacts = connect(study)
            _sync(client, records, pages, artifacts=artifacts, prune=prune)
            return
        except caught as error:
            found = find_sqlite_error(error)
            if found is None or not is_locked(found) or not attempts_left:
                raise ValueError(explain_error(error)) from None


def _sync(client: MlflowClient, records: Mapping[str, Record], pages: Pages, *, artifacts: Path | None, prune: bool) -> None:
    """Log missing runs, delete unfinished ones, and update tags; `artifacts` is the own store's folder, else None."""
    context = next(iter(records.values())).context
    if artifacts is not None:
        _delete_empty_default(client)
    if context:
        records = _changed(client, records, pages)
    own_folder = folder_id()

    def is_ours(run: Run) -> bool:
        """On a server, a run of another folder may be in progress, or may still be needed there."""
        return artifacts is not None or run.data.tags.get(FOLDER_TAG) == own_folder

    for run in live_runs(client, pages):
        if not in_training(run):
            client.delete_run(run.info.run_id)
    existing: dict[str, Run] = {}
    for run in _search_runs(client, _experiments_of_studies(client, pages), context):
        key = run.data.tags.get(KEY_TAG)
        if key is None:
            continue
        has_files = artifacts is not None and key in records and any(records[key].files.values())
        lost_files = has_files and not local_path(run.info.artifact_uri).exists()
        if run.info.status != "FINISHED" or key in existing or lost_files:
            if is_ours(run):
                client.delete_run(run.info.run_id)
        elif key in records:
            existing[key] = run
        elif is_ours(run) and prune:
            client.delete_run(run.info.run_id)
            if artifacts is not None and (folder := local_path(run.info.artifact_uri).parent).is_relative_to(artifacts):
                shutil.rmtree(folder, ignore_errors=True)
        elif is_ours(run):
            existing[key] = run
    for key in existing.keys() - records.keys():
        _update_tags(client, existing[key], {"current": "no"})
    from tqdm import tqdm

    study_id = hashlib.sha256("".join(sorted(records)).encode()).hexdigest()[:8]
    ids: dict[str, str] = {}
    missing = records.keys() - existing.keys()
    with tqdm(total=len(missing), desc="mlflow", unit="run", disable=None) as bar:
        # The report comes first, because the others link to it. A variant comes before its seeds, which name it as parent.
        for key, record in records.items():
            tags = {"current": "yes", "study": study_id, "studies": study_id}
            if record.parent is not None:
                tags["mlflow.parentRunId"] = ids[record.parent]
            if (run := existing.get(key)) is not None:
                ids[key] = run.info.run_id
                tags["studies"] = " ".join(dict.fromkeys([*run.data.tags.get("studies", "").split(), study_id]))
                tags[NOTE_TAG] = pages.run_note(record, ids[key])
                # A run of another folder keeps its own study, parent and links.
                _update_tags(client, run, tags if is_ours(run) else {name: tags[name] for name in ("current", "studies")})
            else:
                ids[key] = _log_run(client, key, record, tags, pages)
                bar.update()
            if record.kind == "report":
                pages.report_id = ids[key]
    for name, experiment_id in pages.experiment_ids.items():
        if not (context and NOTE_TAG in client.get_experiment(experiment_id).tags):
            _describe(client, experiment_id, name, pages)


def _changed(client: MlflowClient, records: Mapping[str, Record], pages: Pages) -> dict[str, Record]:
    """Drop the records of an experiment that the workspace has as runs, except the report and the parents of changed seeds."""
    runs = _search_runs(client, list(pages.experiment_ids.values()), "")
    known = {run.data.tags.get(KEY_TAG) for run in runs if run.info.status == "FINISHED"}
    changed = {key for key, record in records.items() if record.kind == "report" or record.key_in("") not in known}
    changed |= {parent for key in changed if (parent := records[key].parent) is not None}
    return {key: record for key, record in records.items() if key in changed}


def _describe(client: MlflowClient, experiment_id: str, name: str, pages: Pages) -> None:
    """Write the description and the saved views of an experiment, and delete its views of other studies."""
    experiment = client.get_experiment(experiment_id)
    wanted = {NOTE_TAG: pages.experiment_note(name), **pages.view_tags(name, experiment.creation_time)}
    for tag, text in wanted.items():
        if experiment.tags.get(tag) != text:
            _shared(client.set_experiment_tag, experiment_id, tag, text)
    for tag in experiment.tags.keys() - wanted.keys():
        if tag.startswith(f"{VIEW_TAG}{VIEW_PREFIX}"):
            client.delete_experiment_tag(experiment_id, tag)


def _experiments_of_studies(client: MlflowClient, pages: Pages) -> list[str]:
    """The ids of the experiments of this and of older studies, which may have had other tasks."""
    ids = dict.fromkeys(pages.experiment_ids.values())
    token = None
    while True:
        page = client.search_experiments(page_token=token)
        # Only the description tells who created an experiment; others may have any name and any runs.
        ids |= dict.fromkeys(e.experiment_id for e in page if e.tags.get(NOTE_TAG, "").startswith(f"Task `{e.name}`:"))
        token = page.token
        if not token:
            return list(ids)


def _update_tags(client: MlflowClient, run: Run, tags: Mapping[str, str]) -> None:
    """Write only the tags that differ."""
    from mlflow.entities import RunTag

    changed = [RunTag(name, value) for name, value in tags.items() if run.data.tags.get(name) != value]
    if changed:
        client.log_batch(run.info.run_id, tags=changed)


def _delete_empty_default(client: MlflowClient) -> None:
    """MLflow creates an experiment `Default` in every new store."""
    default = client.get_experiment_by_name("Default")
    if (
        default is not None
        and default.lifecycle_stage == "active"
        and not client.search_runs([default.experiment_id], max_results=1)
    ):
        client.delete_experiment(default.experiment_id)


def _search_runs(client: MlflowClient, experiment_ids: list[str], context: str) -> Iterator[Run]:
    token = None
    while True:
        page = client.search_runs(experiment_ids, context_filter(context), max_results=1000, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _get_experiment(client: MlflowClient, name: str, location: Path | None) -> Experiment:
    found = client.get_experiment_by_name(name)
    if found is None:
        # Without this kind, MLflow opens the page of an experiment on language-model traces instead of runs.
        tags = {"mlflow.experimentKind": "custom_model_development"}
        client.create_experiment(name, artifact_location=(location / name).as_uri() if location else None, tags=tags)
        found = client.get_experiment_by_name(name)
    elif found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    return found


def _shared(create: Callable[..., T], *arguments: Any) -> T:
    """Call again if another folder creates the same in the database of a server at the same time: then it is found."""
    from mlflow.exceptions import MlflowException

    try:
        return create(*arguments)
    except MlflowException as error:
        if not re.search("RESOURCE_ALREADY_EXISTS|UniqueViolation|IntegrityError", f"{error.error_code} {error}"):
            raise
        return create(*arguments)


def _log_run(client: MlflowClient, key: str, record: Record, tags: Mapping[str, str], pages: Pages) -> str:
    """Log a new run and return its id."""
    from mlflow.data.meta_dataset import MetaDataset
    from mlflow.data.sources import LocalArtifactDatasetSource
    from mlflow.entities import DatasetInput, InputTag, Metric, Param, RunTag

    started = int((record.started or time.time()) * 1000)
    all_tags = {
        **record.tags,
        **record.origin,
        **tags,
        **{f"figure.{name}": "yes" for name in record.figures},
        "kind": record.kind,
        "mlflow.source.type": "PROJECT",
        "mlflow.source.name": "dvc repro",
        CONTEXT_TAG: context_tag(record.context),
        FOLDER_TAG: folder_id(),
        KEY_TAG: key,
    }
    if "commit" in record.origin:
        all_tags["mlflow.source.git.commit"] = record.origin["commit"]
    experiment_id = pages.experiment_ids[record.experiment]
    name = f"{record.name} ({record.context})" if record.context else record.name
    run = client.create_run(experiment_id, start_time=started, tags=all_tags, run_name=name)
    note = RunTag(NOTE_TAG, pages.run_note(record, run.info.run_id))
    metrics = [Metric(name, value, started, step) for name, step, value in record.metrics]
    if record.seconds is not None:
        metrics.append(Metric("cell_seconds", record.seconds, started, 0))
    for start in range(0, max(len(metrics), 1), 1000):
        params, note_tags = ([Param(k, v) for k, v in record.params.items()], [note]) if start == 0 else ([], [])
        client.log_batch(run.info.run_id, metrics[start : start + 1000], params, note_tags)
    if record.dataset is not None:
        source = LocalArtifactDatasetSource(record.dataset["path"])
        dataset = MetaDataset(source, name=record.dataset["name"], digest=record.dataset["digest"])
        inputs = [DatasetInput(dataset._to_mlflow_entity(), [InputTag("mlflow.data.context", "training")])]
        _shared(client.log_inputs, run.info.run_id, inputs)
    for folder, paths in record.files.items():
        for path in paths:
            client.log_artifact(run.info.run_id, str(path), folder or None)
    for path in record.volatile_files:
        client.log_artifact(run.info.run_id, str(path))
    client.set_terminated(run.info.run_id, "FINISHED", end_time=started + int((record.seconds or 0) * 1000))
    return str(run.info.run_id)
