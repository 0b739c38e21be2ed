"""The MLflow store, made to agree with the files: an experiment a task, a run a variant, its seeds within it, one for the report.

A run is found by a digest of everything that is logged in it. What is there already is left alone, what is missing is
logged, so the store can be thrown away, and repeats change nothing. What the files no longer say stays, as part of an older
study: tags say which studies a run belongs to, and whether the files still say it. Runs made under `dvc exp run` bear the
experiment's name and are not touched by the runs of the workspace, nor touch them. Under `dvc exp run --temp` or `--queue` the
store is made in DVC's temporary folder and lost with it, unless MLFLOW_TRACKING_URI names another.

A store on this machine that was left complete, and the files that it shows, are known again by their sizes and times. One that
was copied or moved with its folder is given the new paths of its artifacts. For DVC, which cannot compare stores, there is a
digest of what is logged.

On a server, which other folders may log to as well, a run bears the folder that logged it. Others use it where it is what they
would log, and leave it there.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config.study import Study
from pipeline.storage.files import atomic_write
from pipeline.tracking.pages import _CONTEXT, _FOLDER, _KEY, Pages, _context, _in_context
from pipeline.tracking.records import Record, _report_record, _task_records
from pipeline.tracking.store import (
    ARTIFACTS,
    COMPLETE,
    STAMP,
    STORE,
    create_store,
    fingerprint,
    local_path,
    relocate_artifacts,
    tracking_uri,
)

if TYPE_CHECKING:
    from mlflow.entities import Experiment, Run
    from mlflow.tracking import MlflowClient


def track(study: Study, *, prune: bool = False) -> None:
    """Brings the store up to date; `prune` deletes the runs of older studies.

    Raises ValueError where a result is missing or the store cannot be reached.
    """
    local = not os.environ.get("MLFLOW_TRACKING_URI")
    if local and not prune and STAMP.exists() and COMPLETE.exists() and COMPLETE.read_text(encoding="utf-8") == fingerprint():
        return
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    records = {record.key: record for record in [_report_record(study), *_task_records(study)]}

    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    try:
        if local:
            if STORE.exists():
                relocate_artifacts()
            else:
                create_store()
        _sync(MlflowClient(tracking_uri()), study, records, artifacts=ARTIFACTS.resolve() if local else None, prune=prune)
    except MlflowException as error:
        raise ValueError(f"MLflow at {tracking_uri()}: {' '.join(str(error).split())[:200]}") from None
    with atomic_write(STAMP) as path:
        contents = sorted(record.content for record in records.values())
        path.write_text(hashlib.sha256("".join(contents).encode()).hexdigest() + "\n", encoding="utf-8")
    if local:
        with atomic_write(COMPLETE) as path:
            path.write_text(fingerprint(), encoding="utf-8")


def _sync(client: MlflowClient, study: Study, records: Mapping[str, Record], *, artifacts: Path | None, prune: bool) -> None:
    names = dict.fromkeys(record.experiment for record in records.values())
    context = next(iter(records.values())).context
    pages = Pages(study, {name: _experiment(client, name, artifacts).experiment_id for name in names}, context)
    if artifacts is not None:
        _tidy(client)
    here = _folder()

    def ours(run: Run) -> bool:
        """Not logged by another folder, which may still be at it, or need it when we no longer do."""
        return artifacts is not None or run.data.tags.get(_FOLDER) == here

    there: dict[str, Run] = {}
    for run in _runs_in(client, [e.experiment_id for e in client.search_experiments()], context):
        key = run.data.tags[_KEY]
        has_files = artifacts is not None and key in records and any(records[key].files.values())
        lost = has_files and not local_path(run.info.artifact_uri).exists()
        if run.info.status != "FINISHED" or key in there or lost:
            if ours(run):
                client.delete_run(run.info.run_id)
        elif key in records:
            there[key] = run
        elif ours(run) and prune:
            client.delete_run(run.info.run_id)
            if artifacts is not None and (folder := local_path(run.info.artifact_uri).parent).is_relative_to(artifacts):
                shutil.rmtree(folder, ignore_errors=True)
        elif ours(run):
            there[key] = run
    for key in there.keys() - records.keys():
        _tag(client, there[key], {"current": "no"})
    from tqdm import tqdm

    name_of_study = hashlib.sha256("".join(sorted(records)).encode()).hexdigest()[:8]
    ids: dict[str, str] = {}
    missing = records.keys() - there.keys()
    with tqdm(total=len(missing), desc="mlflow", unit="run", disable=None) as bar:
        # The report first, which the others link to; a variant before its seeds, which are shown in it.
        for key, record in records.items():
            tags = {"current": "yes", "study": name_of_study, "studies": name_of_study}
            if record.parent is not None:
                tags["mlflow.parentRunId"] = ids[record.parent]
            if (run := there.get(key)) is not None:
                ids[key] = run.info.run_id
                tags["studies"] = " ".join(dict.fromkeys([*run.data.tags.get("studies", "").split(), name_of_study]))
                tags["mlflow.note.content"] = pages.note(record, ids[key])
                # Study, parent and links of another folder's run are those of the study that it is of.
                _tag(client, run, tags if ours(run) else {name: tags[name] for name in ("current", "studies")})
            else:
                ids[key] = _log(client, key, record, tags, pages)
                bar.update()
            if record.kind == "report":
                pages.report = ids[key]
    for name, experiment in pages.experiments.items():
        client.set_experiment_tag(experiment, "mlflow.note.content", pages.about(name))


def _tag(client: MlflowClient, run: Run, tags: Mapping[str, str]) -> None:
    """Sets those that are not so already."""
    from mlflow.entities import RunTag

    changed = [RunTag(name, value) for name, value in tags.items() if run.data.tags.get(name) != value]
    if changed:
        client.log_batch(run.info.run_id, tags=changed)


def _folder() -> str:
    """A digest that tells this folder from those that others log from."""
    return hashlib.sha256(os.fsencode(f"{platform.node()} {Path.cwd()}")).hexdigest()[:16]


def _tidy(client: MlflowClient) -> None:
    """Takes away the experiment that MLflow creates by itself, where it is empty."""
    default = client.get_experiment_by_name("Default")
    if (
        default is not None
        and default.lifecycle_stage == "active"
        and not client.search_runs([default.experiment_id], max_results=1)
    ):
        client.delete_experiment(default.experiment_id)


def _runs_in(client: MlflowClient, experiments: list[str], context: str) -> Iterator[Run]:
    token = None
    while True:
        page = client.search_runs(experiments, _in_context(context), max_results=1000, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _experiment(client: MlflowClient, name: str, artifacts: Path | None) -> Experiment:
    found = client.get_experiment_by_name(name)
    if found is None:
        # Without its kind, the pages of an experiment open on traces of language models instead of runs.
        tags = {"mlflow.experimentKind": "custom_model_development"}
        client.create_experiment(name, artifact_location=(artifacts / name).as_uri() if artifacts else None, tags=tags)
        found = client.get_experiment_by_name(name)
    elif found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    return found


def _log(client: MlflowClient, key: str, record: Record, tags: Mapping[str, str], pages: Pages) -> str:
    """Logs the run; its id."""
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
        _CONTEXT: _context(record.context),
        _FOLDER: _folder(),
        _KEY: key,
    }
    if "commit" in record.origin:
        all_tags["mlflow.source.git.commit"] = record.origin["commit"]
    experiment = pages.experiments[record.experiment]
    name = f"{record.name} ({record.context})" if record.context else record.name
    run = client.create_run(experiment, start_time=started, tags=all_tags, run_name=name)
    note = RunTag("mlflow.note.content", pages.note(record, run.info.run_id))
    metrics = [Metric(name, value, started, step) for name, step, value in record.metrics]
    if record.seconds is not None:
        metrics.append(Metric("cell_seconds", record.seconds, started, 0))
    for at in range(0, max(len(metrics), 1), 1000):
        params, named = ([Param(k, v) for k, v in record.params.items()], [note]) if at == 0 else ([], [])
        client.log_batch(run.info.run_id, metrics[at : at + 1000], params, named)
    if record.dataset is not None:
        source = LocalArtifactDatasetSource(record.dataset["path"])
        dataset = MetaDataset(source, name=record.dataset["name"], digest=record.dataset["digest"])
        client.log_inputs(
            run.info.run_id, [DatasetInput(dataset._to_mlflow_entity(), [InputTag("mlflow.data.context", "training")])]
        )
    for folder, paths in record.files.items():
        for path in paths:
            client.log_artifact(run.info.run_id, str(path), folder or None)
    for path in record.volatile_files:
        client.log_artifact(run.info.run_id, str(path))
    client.set_terminated(run.info.run_id, "FINISHED", end_time=started + int((record.seconds or 0) * 1000))
    return str(run.info.run_id)
