"""The MLflow store, made to agree with the files: an experiment a task, a run a variant and seed, one run for the report.

A run is found by a digest of everything that is logged in it. What is there already is left alone, what is missing is
logged, what the files no longer say is deleted; so the store can be thrown away, and repeats change nothing. Runs made under
`dvc exp run` bear the experiment's name and are not touched by the runs of the workspace, nor touch them.

A store on this machine that was left complete, and the files that it shows, are known again by their sizes and times.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import runs
from pipeline.files import DATA, FILTERS, LOGS, REPORTS, RESULTS, RUNS, VERDICTS, read_json, whole
from pipeline.grid import variants_on
from pipeline.params import Study, shown_tasks, shown_variants
from pipeline.provenance import provenance

if TYPE_CHECKING:
    import pandas as pd
    from mlflow.entities import Experiment, Run
    from mlflow.tracking import MlflowClient

STORE, ARTIFACTS = Path("mlflow.db"), Path("mlartifacts")
REST = ARTIFACTS / ".complete"
"""What the files and the store looked like when the store was complete."""
STUDY = "study"
"""The experiment that holds the run of the report."""
_KEY = "cat.key"
_OFF = "-"
_EXPERIMENT_NOTE = (
    "A run a variant and seed. Group by the parameter `variant` to see its seeds together."
    " A metric `test/...` has the evaluation length as its step."
)


@dataclass(frozen=True, kw_only=True)
class Record:
    """One run to be: all that is logged, so that its digest says whether it is logged already."""

    experiment: str
    name: str
    note: str
    params: dict[str, str]
    tags: dict[str, str]
    metrics: list[tuple[str, int, float]]
    """Name, step and value."""
    files: dict[str, list[Path]]
    """Artifact folder -> files."""
    dataset: dict[str, str] | None = None
    seconds: float | None = None
    started: float | None = None
    context: str = field(default_factory=lambda: os.environ.get("DVC_EXP_NAME", ""))

    @property
    def key(self) -> str:
        """A digest of everything but when, where and by which commit."""
        digest = hashlib.sha256()
        digest.update(
            json.dumps([self.experiment, self.name, self.note, self.params, self.tags, self.dataset, self.context]).encode()
        )
        digest.update(repr(self.metrics).encode())
        for folder, paths in self.files.items():
            for path in paths:
                digest.update(f"{folder}/{path.name}".encode() + hashlib.sha256(path.read_bytes()).digest())
        return digest.hexdigest()[:32]


def track(study: Study) -> None:
    """Brings the store up to date. Raises ValueError where a result is missing or the store cannot be reached."""
    local = not os.environ.get("MLFLOW_TRACKING_URI")
    if local and REST.exists() and REST.read_text(encoding="utf-8") == _appearance():
        return
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    records = {record.key: record for record in [*_task_records(study), _report_record(study)]}

    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    uri = f"sqlite:///{STORE.resolve()}" if local else os.environ["MLFLOW_TRACKING_URI"]
    try:
        _sync(MlflowClient(uri), records, artifacts=ARTIFACTS.resolve() if local else None)
    except MlflowException as error:
        raise ValueError(f"MLflow at {uri}: {' '.join(str(error).split())[:200]}") from None
    if local:
        with whole(REST) as path:
            path.write_text(_appearance(), encoding="utf-8")


def _appearance() -> str:
    """A digest of the names, sizes and times of all that is logged, of what logs it, and of the store."""
    folders = (path for folder in (RUNS, RESULTS, VERDICTS, REPORTS, LOGS) for path in folder.rglob("*"))
    files = sorted([*folders, *DATA.glob("*/meta.json"), Path("params.yaml"), Path(__file__), STORE])
    digest = hashlib.sha256(os.environ.get("DVC_EXP_NAME", "").encode())
    for path in files:
        if path.is_file():
            about = path.stat()
            digest.update(f"{path} {about.st_size} {about.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _sync(client: MlflowClient, records: Mapping[str, Record], *, artifacts: Path | None) -> None:
    experiments = {
        name: _experiment(client, name, artifacts) for name in dict.fromkeys(record.experiment for record in records.values())
    }
    if artifacts is not None:
        _tidy(client)
    context = next(iter(records.values())).context
    there: set[str] = set()
    for run in _our_runs(client, [e.experiment_id for e in client.search_experiments()], context):
        key = run.data.tags[_KEY]
        if run.info.status == "FINISHED" and key in records and key not in there:
            there.add(key)
        else:
            client.delete_run(run.info.run_id)
    from tqdm import tqdm

    missing = {key: record for key, record in records.items() if key not in there}
    commit = provenance()
    for key, record in tqdm(missing.items(), desc="mlflow", unit="run", disable=None):
        _log(client, experiments[record.experiment].experiment_id, key, record, commit)


def _tidy(client: MlflowClient) -> None:
    """Takes away the experiment that MLflow creates by itself, where it is empty."""
    default = client.get_experiment_by_name("Default")
    if (
        default is not None
        and default.lifecycle_stage == "active"
        and not client.search_runs([default.experiment_id], max_results=1)
    ):
        client.delete_experiment(default.experiment_id)


def _our_runs(client: MlflowClient, experiments: list[str], context: str) -> Iterator[Run]:
    token = None
    while True:
        page = client.search_runs(
            experiments, f"tags.cat.context = '{context or 'workspace'}'", max_results=1000, page_token=token
        )
        yield from page
        token = page.token
        if not token:
            return


def _experiment(client: MlflowClient, name: str, artifacts: Path | None) -> Experiment:
    found = client.get_experiment_by_name(name)
    if found is None:
        # Without its kind, the pages of an experiment open on traces of language models instead of runs.
        tags = {"mlflow.experimentKind": "custom_model_development", "mlflow.note.content": _EXPERIMENT_NOTE}
        client.create_experiment(name, artifact_location=(artifacts / name).as_uri() if artifacts else None, tags=tags)
        found = client.get_experiment_by_name(name)
    elif found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    return found


def _log(client: MlflowClient, experiment: str, key: str, record: Record, commit: Mapping[str, Any]) -> None:
    from mlflow.data.meta_dataset import MetaDataset
    from mlflow.data.sources import LocalArtifactDatasetSource
    from mlflow.entities import DatasetInput, InputTag, Metric, Param

    started = int((record.started or time.time()) * 1000)
    tags = {
        **record.tags,
        "mlflow.note.content": record.note,
        "mlflow.source.type": "PROJECT",
        "mlflow.source.name": "dvc repro",
        "cat.context": record.context or "workspace",
        _KEY: key,
    }
    if commit["commit"]:
        tags |= {"mlflow.source.git.commit": commit["commit"], "commit": commit["commit"], "dirty": str(commit["dirty"]).lower()}
    run = client.create_run(experiment, start_time=started, tags=tags, run_name=record.name)
    metrics = [Metric(name, value, started, step) for name, step, value in record.metrics]
    if record.seconds is not None:
        metrics.append(Metric("cell_seconds", record.seconds, started, 0))
    for at in range(0, max(len(metrics), 1), 1000):
        client.log_batch(
            run.info.run_id, metrics[at : at + 1000], [Param(k, v) for k, v in record.params.items()] if at == 0 else []
        )
    if record.dataset is not None:
        source = LocalArtifactDatasetSource(record.dataset["path"])
        dataset = MetaDataset(source, name=record.dataset["name"], digest=record.dataset["digest"])
        client.log_inputs(
            run.info.run_id, [DatasetInput(dataset._to_mlflow_entity(), [InputTag("mlflow.data.context", "training")])]
        )
    for folder, paths in record.files.items():
        for path in paths:
            client.log_artifact(run.info.run_id, str(path), folder or None)
    client.set_terminated(run.info.run_id, "FINISHED", end_time=started + int((record.seconds or 0) * 1000))


def _task_records(study: Study) -> Iterator[Record]:
    import pandas as pd

    from pipeline.results import read_history, read_results

    results = read_results(study)
    shared = _shared_params(study)
    for task, section in study.tasks.items():
        meta = read_json(DATA / task / "meta.json")
        digest = hashlib.sha256((DATA / task / "meta.json").read_bytes()).hexdigest()[:16]
        filters = pd.read_csv(FILTERS / f"{task}.csv", dtype={"row": str})
        data_params = {f"data.{key}": str(value) for key, value in section.data.model_dump(mode="json").items()}
        for variant in variants_on(study, task):
            summary = runs.read_summary(task, variant)
            history = read_history(study, task, variant, summary["learning_rate"])
            ablations = [n for n, a in study.ablations.items() if task in shown_tasks(study, a) and variant in shown_variants(a)]
            started, seconds = _when(task, variant)
            for seed in study.seeds:
                run = next(r for r in summary["runs"] if (r["seed"], r["learning_rate"]) == (seed, summary["learning_rate"]))
                scores = results[(results["task"] == task) & (results["variant"] == variant) & (results["seed"] == seed)]
                weights = runs.weights_path(task, variant, seed)
                yield Record(
                    experiment=task,
                    name=f"{variant} seed {seed}",
                    note=f"`{variant}` on `{task}`, seed {seed}: stopped by {run['stop']} after {run['steps']} steps.",
                    params={
                        "task": task,
                        "variant": variant,
                        "seed": str(seed),
                        **_model_params(study, variant),
                        "learning_rate": f"{summary['learning_rate']:g}",
                        "parameters": str(summary["parameters"]),
                        "steps": str(section.train.steps),
                        "batch": str(section.train.batch),
                        **shared,
                        **data_params,
                    },
                    tags={
                        "task": task,
                        "variant": variant,
                        "seed": str(seed),
                        "ablations": ", ".join(ablations),
                        "stop": run["stop"],
                        "solves_every_length": _shown(run["solves_every_length"]),
                        "device": summary["device"],
                        "data_digest": digest,
                    },
                    metrics=[
                        *_curves(history[history["seed"] == seed]),
                        *_scores(study, task, scores),
                        *_filters(filters[(filters["variant"] == variant) & (filters["seed"] == seed)]),
                        ("steps_run", 0, float(run["steps"])),
                    ],
                    files={
                        "": [runs.folder(task, variant) / "summary.json", runs.folder(task, variant) / "history.csv"],
                        "weights": [weights] if weights.exists() else [],
                    },
                    dataset={"name": task, "digest": digest, "path": str(DATA / task), "kind": meta["kind"]},
                    started=started,
                    seconds=seconds,
                )


def _report_record(study: Study) -> Record:
    """The figures and tables: not of one run but of all of them."""
    tables = sorted(
        [*REPORTS.glob("*.md"), *REPORTS.glob("*.html"), *REPORTS.glob("*.csv"), *RESULTS.rglob("*.csv"), *VERDICTS.glob("*.csv")]
    )
    headline = REPORTS / "headline.md"
    return Record(
        experiment=STUDY,
        name="report",
        note=headline.read_text(encoding="utf-8") if headline.exists() else "No ablation was run.",
        params={"seeds": str(list(study.seeds)), "tasks": ", ".join(study.tasks), "variants": str(len(study.variants))},
        tags={},
        metrics=[],
        files={
            "": [path for name in ("params.yaml", "claims.yaml") if (path := Path(name)).exists()],
            "figures": sorted((REPORTS / "figures").glob("*.png")),
            "svg": sorted((REPORTS / "svg").glob("*.svg")),
            "tables": tables,
        },
    )


def _shared_params(study: Study) -> dict[str, str]:
    return {**{key: f"{value:g}" for key, value in study.train.model_dump().items()}, "precision": study.precision}


def _model_params(study: Study, variant: str) -> dict[str, str]:
    """The same keys for every variant of the study: what a mixer does not have is `-`, as is what is switched off."""
    keys = dict.fromkeys(key for model in study.variants.values() for key in type(model).model_fields)
    values = study.variants[variant].model_dump()
    return {f"model.{key}": _shown(values.get(key)) for key in keys}


def _shown(value: Any) -> str:
    return _OFF if value is None or value is False else str(value).lower()


def _curves(history: pd.DataFrame) -> Iterator[tuple[str, int, float]]:
    for column, name in (("train_loss", "train/loss"), ("valid_loss", "valid/loss"), ("valid_accuracy", "valid/accuracy")):
        known = history.dropna(subset=column)
        for step, value in zip(known["step"], known[column], strict=True):
            yield name, int(step), float(value)


def _scores(study: Study, task: str, scores: pd.DataFrame) -> Iterator[tuple[str, int, float]]:
    """Every test metric with the length as its step, and the primary one once more by name for each length of the tables."""
    from pipeline.results import PRIMARY

    scores = scores.dropna(subset="value")
    for metric, length, value in zip(scores["metric"], scores["length"], scores["value"], strict=True):
        yield f"test/{metric}", int(length), float(value)
    primary = scores[scores["metric"] == PRIMARY[study.tasks[task].data.goal]]
    for multiple, value in zip(primary["multiple"], primary["value"], strict=True):
        if multiple in study.evaluate.multiples:
            yield f"{PRIMARY[study.tasks[task].data.goal]}_{multiple:g}x", 0, float(value)


def _filters(filters: pd.DataFrame) -> Iterator[tuple[str, int, float]]:
    """A filter as a curve over its taps: `filter/1_k_0` is that of layer 1 on the keys of head 0."""
    names = filters["layer"].astype(str) + "_" + filters["stream"] + "_" + filters["row"].str.replace(">", "_to_")
    for name, tap, value in zip(names, filters["tap"], filters["value"], strict=True):
        yield f"filter/{name}", int(tap), float(value)


def _when(task: str, variant: str) -> tuple[float | None, float | None]:
    """Start and duration, where this very result was trained here and not restored from a cache."""
    path = LOGS / task / f"{variant}.json"
    if not path.exists():
        return None, None
    log = read_json(path)
    return (log["started"], log["seconds"]) if log["summary"] == runs.digest(task, variant) else (None, None)
