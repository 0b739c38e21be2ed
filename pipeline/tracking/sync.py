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
import json
import math
import os
import platform
import shutil
import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import quote, unquote, urlparse

from cat.config import OF_A_MODEL, Hybrid, Model
from pipeline.config.grid import cells, variants_on
from pipeline.config.study import Study, shown_tasks, shown_variants
from pipeline.storage import runs
from pipeline.storage.files import DATA, LOGS, REPORTS, RESULTS, RUNS, VERDICTS, read_json, whole
from pipeline.storage.training_log import read_log

if TYPE_CHECKING:
    import pandas as pd
    from mlflow.entities import Experiment, Run
    from mlflow.tracking import MlflowClient

    from cat.model import SequenceModel

STORE, ARTIFACTS = Path("mlflow.db"), Path("mlartifacts")
REST = ARTIFACTS / ".complete"
"""What the files and the store looked like when the store was complete."""
STAMP = ARTIFACTS / "stamp"
"""A digest of all that is logged, whenever and wherever that was trained."""
STUDY = "study"
"""The experiment that holds the run of the report."""
WORKSPACE = "workspace"
"""The context of a run of no experiment of DVC's."""
_KEY, _CONTEXT, _FOLDER = "cat.key", "cat.evaluation.by_position", "cat.folder"
CURVES = {
    "train_loss": "train/loss",
    "peak_loss": "train/peak_loss",
    "gradient_norm": "train/gradient_norm",
    "valid_loss": "valid/loss",
    "valid_accuracy": "valid/accuracy",
    "largest_logit": "attention/largest_logit",
}
"""How a column of a history is called here."""
QUERY = ",.'="
"""What stays as it is in the query of an address."""
_OFF = "-"


@dataclass(frozen=True, kw_only=True)
class Record:
    """One run to be: all that is logged, so that its digest says whether it is logged already."""

    experiment: str
    kind: Literal["report", "variant", "seed"]
    name: str
    note: str
    params: dict[str, str]
    tags: dict[str, str]
    metrics: list[tuple[str, int, float]]
    """Name, step and value."""
    files: dict[str, list[Path]]
    """Artifact folder -> files."""
    figures: tuple[str, ...]
    """The ablations in whose figures it is."""
    within: str | None = None
    """The key of the variant's run that a seed's run is shown in."""
    beside: tuple[Path, ...] = ()
    """Files that differ from time to time, and are logged with the rest."""
    origin: dict[str, str] = field(default_factory=dict)
    """By which commit it was trained, where that is known."""
    dataset: dict[str, str] | None = None
    seconds: float | None = None
    started: float | None = None
    context: str = field(default_factory=lambda: os.environ.get("DVC_EXP_NAME", ""))

    @cached_property
    def content(self) -> str:
        """A digest of everything but when, where, by which commit and in which of DVC's experiments."""
        digest = hashlib.sha256()
        texts = [self.experiment, self.kind, self.name, self.note, self.figures]
        digest.update(json.dumps([*texts, self.params, self.tags, self.dataset]).encode())
        digest.update(repr(self.metrics).encode())
        for folder, paths in self.files.items():
            for path in paths:
                digest.update(f"{folder}/{path.name}".encode() + hashlib.sha256(path.read_bytes()).digest())
        return digest.hexdigest()

    @property
    def key(self) -> str:
        """What its run is found by: the same content has a run in each of DVC's experiments."""
        return hashlib.sha256(f"{self.content} {self.context}".encode()).hexdigest()[:32]


def track(study: Study, *, prune: bool = False) -> None:
    """Brings the store up to date; `prune` deletes the runs of older studies.

    Raises ValueError where a result is missing or the store cannot be reached.
    """
    local = not os.environ.get("MLFLOW_TRACKING_URI")
    if local and not prune and STAMP.exists() and REST.exists() and REST.read_text(encoding="utf-8") == _appearance():
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
                _follow_the_folder()
            else:
                _begin_store()
        _sync(MlflowClient(_uri()), study, records, artifacts=ARTIFACTS.resolve() if local else None, prune=prune)
    except MlflowException as error:
        raise ValueError(f"MLflow at {_uri()}: {' '.join(str(error).split())[:200]}") from None
    with whole(STAMP) as path:
        contents = sorted(record.content for record in records.values())
        path.write_text(hashlib.sha256("".join(contents).encode()).hexdigest() + "\n", encoding="utf-8")
    if local:
        with whole(REST) as path:
            path.write_text(_appearance(), encoding="utf-8")


def _begin_store() -> None:
    """A store without runs, whole or not at all: MLflow makes its tables one by one, and cannot go on where that was ended."""
    from mlflow.tracking import MlflowClient

    folder = STORE.with_name(f".{STORE.name}.part")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    MlflowClient(f"sqlite:///{folder / STORE.name}").search_experiments()
    (folder / STORE.name).replace(STORE)
    shutil.rmtree(folder)


def _follow_the_folder() -> None:
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


def _path(uri: str) -> Path:
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
        found = MlflowClient(_uri()).list_artifacts(run_id, "weights")
        if not found:
            raise ValueError(f"run {run_id} has no weights: they are in the runs of single seeds that did not diverge")
        return runs.load_model(download_artifacts(f"runs:/{run_id}/{found[0].path}", tracking_uri=_uri()))
    except MlflowException as error:
        raise ValueError(f"MLflow at {_uri()}: {' '.join(str(error).split())[:200]}") from None


def _uri() -> str:
    # A relative path: in that of the folder there may be signs that mean something in an address, such as ? and %.
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{STORE}"


def _appearance() -> str:
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
        lost = has_files and not _path(run.info.artifact_uri).exists()
        if run.info.status != "FINISHED" or key in there or lost:
            if ours(run):
                client.delete_run(run.info.run_id)
        elif key in records:
            there[key] = run
        elif ours(run) and prune:
            client.delete_run(run.info.run_id)
            if artifacts is not None and (folder := _path(run.info.artifact_uri).parent).is_relative_to(artifacts):
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
            if record.within is not None:
                tags["mlflow.parentRunId"] = ids[record.within]
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


class Pages:
    """Addresses within MLflow's pages, and the notes that link figures to runs and runs to figures."""

    def __init__(self, study: Study, experiments: dict[str, str], context: str):
        self.study, self.experiments = study, experiments
        self.here = f"tags.current = 'yes' and {_in_context(context)}"
        self.report = ""
        """The run of the report."""

    def about(self, experiment: str) -> str:
        """What an experiment is, and its runs as one would look for them."""
        if experiment == STUDY:
            return "The reports: figures, tables, verdicts. The one whose tag `current` is yes is that of the files."
        from pipeline.storage.results import PRIMARY

        goal = self.study.tasks[experiment].data.goal
        best = f"{PRIMARY[goal]}_{max(self.study.evaluate.multiples):g}x"
        by = f"&orderByKey=metrics.%60{best}%60&orderByAsc={'false' if goal == 'accuracy' else 'true'}"
        variants, seeds = (f"{self.here} and tags.kind = '{kind}'" for kind in ("variant", "seed"))
        listed = (
            (f"the variants, the best first, by `{best}`", variants, by),
            (f"their `test/{PRIMARY[goal]}` against length, as a chart", variants, "&compareRunsMode=CHART"),
            ("every seed", seeds, by),
            ("what older studies found", "tags.current = 'no'", ""),
            ("what experiments of DVC found", f"tags.{_CONTEXT} != '{WORKSPACE}'", ""),
        )
        links = "\n".join(f"* [{words}]({self._search([experiment], wanted)}{more})" for words, wanted, more in listed)
        return (
            f"A run a variant, with means over its seeds, whose runs are within it.\n\n{links}\n\n"
            "A metric `test/...` has the evaluation length as its step; `..._sd` is the standard deviation over seeds."
        )

    def note(self, record: Record, run_id: str) -> str:
        """What is said of the run, and where to go from it."""
        parts = [record.note]
        if record.kind == "report":
            tasks = [name for name in self.experiments if name != STUDY]
            wanted = {figure: f"tags.`figure.{figure}` = 'yes' and {self.here}" for figure in record.figures}
            links = [f"[{figure}]({self._search(tasks, runs_of_it)})" for figure, runs_of_it in wanted.items()]
            parts = ["Report, figures and tables are under Artifacts.", record.note, f"The runs in a figure: {', '.join(links)}."]
        if record.kind == "seed":
            parts.append(f'```python\nfrom pipeline.tracking import load_run\n\nmodel = load_run("{run_id}")\n```')
        if record.kind != "report":
            shown = ", ".join(f"[{figure}]({self._artifact(f'figures/{figure}.png')})" for figure in record.figures)
            parts.append(f"Figures that it is in: {shown or 'none'}; [the report]({self._artifact('report.html')}).")
        if "dvc.md5" in record.tags:
            parts.append(
                f"`git log -S {record.tags['dvc.md5']} -- dvc.lock` finds the commits whose dvc.lock has this result, as that of"
                f" the stage `{record.tags['dvc.stage']}`."
            )
        return "\n\n".join(parts)

    def _search(self, experiments: list[str], wanted: str) -> str:
        ids = [self.experiments[name] for name in experiments]
        page = f"#/experiments/{ids[0]}/runs?workflowType=machine_learning"
        if len(ids) > 1:
            page = f"#/compare-experiments/s?experiments={quote(json.dumps(ids, separators=(',', ':')), safe=QUERY)}"
        return f"{page}&searchFilter={quote(wanted, safe=QUERY)}"

    def _artifact(self, path: str) -> str:
        return f"#/experiments/{self.experiments[STUDY]}/runs/{self.report}/artifacts/{path}"


def _in_context(name: str) -> str:
    """The runs of one of DVC's experiments, or of none."""
    return f"tags.{_CONTEXT} = '{_context(name)}'"


def _context(name: str) -> str:
    """How a tag names one of DVC's experiments: without quotes, which MLflow's filters cannot escape."""
    return quote(name) or WORKSPACE


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
    for path in record.beside:
        client.log_artifact(run.info.run_id, str(path))
    client.set_terminated(run.info.run_id, "FINISHED", end_time=started + int((record.seconds or 0) * 1000))
    return str(run.info.run_id)


def _task_records(study: Study) -> Iterator[Record]:
    from pipeline.storage.results import read_filters, read_history, read_results

    results = read_results(study)
    shared = _shared_params(study)
    stages = {(c.task, c.variant): f"train_{c.ablation}@{c.task}-{c.variant}" for c in cells(study)}
    for task, section in study.tasks.items():
        meta = read_json(DATA / task / "meta.json")
        digest = hashlib.sha256((DATA / task / "meta.json").read_bytes()).hexdigest()[:16]
        filters = read_filters(task)
        data_params = {f"data.{key}": str(value) for key, value in section.data.model_dump(mode="json").items()}
        for variant in variants_on(study, task):
            summary = runs.read_summary(task, variant)
            history = read_history(study, task, variant, summary["learning_rate"])
            scores = results[(results["task"] == task) & (results["variant"] == variant)]
            origin, started, seconds = _origin(task, variant)
            chosen = [r for r in summary["runs"] if r["learning_rate"] == summary["learning_rate"] and r["seed"] in study.seeds]
            common: dict[str, Any] = {
                "experiment": task,
                "figures": tuple(
                    n for n, a in study.ablations.items() if task in shown_tasks(study, a) and variant in shown_variants(a)
                ),
                "origin": origin,
                "dataset": {"name": task, "digest": digest, "path": str(DATA / task), "kind": meta["kind"]},
                "started": started,
                "seconds": seconds,
            }
            parameters = {
                "task": task,
                "variant": variant,
                **_model_params(study, variant),
                "learning_rate": f"{summary['learning_rate']:g}",
                "parameters": str(summary["parameters"]),
                "steps": str(section.train.steps),
                "batch": str(section.train.batch),
                **shared,
                **data_params,
            }
            tags = {
                "task": task,
                "variant": variant,
                "device": summary["device"],
                "data_digest": digest,
                "dvc.stage": stages[task, variant],
                "dvc.md5": dvc_md5(runs.folder(task, variant)),
            }
            seeds = ", ".join(map(str, study.seeds))
            whole_cell = Record(
                kind="variant",
                name=variant,
                note=f"`{variant}` on `{task}`: mean over seeds {seeds}; `..._sd` is the standard deviation.",
                params={**parameters, "seed": seeds},
                tags={**tags, "seed": seeds, "diverged": str(sum(run["stop"] == "diverged" for run in chosen))},
                metrics=[*_curves(_over_seeds(history)), *_scores(study, task, scores)],
                files={"": [runs.folder(task, variant) / "summary.json", runs.folder(task, variant) / "history.csv"]},
                **common,
            )
            yield whole_cell
            for run in sorted(chosen, key=lambda run: study.seeds.index(run["seed"])):
                seed = run["seed"]
                weights = runs.weights_path(task, variant, seed)
                yield Record(
                    kind="seed",
                    within=whole_cell.key,
                    name=f"{variant} seed {seed}",
                    note=f"`{variant}` on `{task}`, seed {seed}: stopped by {run['stop']} after {run['steps']} steps.",
                    params={**parameters, "seed": str(seed)},
                    tags={
                        **tags,
                        "seed": str(seed),
                        "stop": run["stop"],
                        "solves_every_length": _shown(run["solves_every_length"]),
                    },
                    metrics=[
                        *_curves(history[history["seed"] == seed]),
                        *_scores(study, task, scores[scores["seed"] == seed]),
                        *_filters(filters[(filters["variant"] == variant) & (filters["seed"] == seed)]),
                        ("steps_run", 0, float(run["steps"])),
                    ],
                    files={"weights": [weights] if weights.exists() else []},
                    **common,
                )


def dvc_md5(folder: Path) -> str:
    """What dvc.lock calls a folder: the digest of the list of its files with theirs."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    listed = [
        {"md5": hashlib.md5(path.read_bytes()).hexdigest(), "relpath": path.relative_to(folder).as_posix()} for path in files
    ]
    return hashlib.md5(json.dumps(listed, sort_keys=True).encode()).hexdigest() + ".dir"


def _report_record(study: Study) -> Record:
    """The figures and tables: not of one run but of all of them."""
    from pipeline.reporting.verdicts import read_verdicts

    tables = sorted([*REPORTS.glob("*.csv"), *RESULTS.rglob("*.csv"), *VERDICTS.glob("*.csv")])
    verdicts = [f"* {row.verdict}: {row.says}" for row in read_verdicts().itertuples()]
    return Record(
        experiment=STUDY,
        kind="report",
        name="report",
        note="\n".join(verdicts) or "No claims were judged.",
        params={"seeds": str(list(study.seeds)), "tasks": ", ".join(study.tasks), "variants": str(len(study.variants))},
        tags={},
        metrics=[],
        files={
            "": [path for name in ("params.yaml", "claims.yaml") if (path := Path(name)).exists()],
            "figures": sorted((REPORTS / "figures").glob("*.png")),
            "svg": sorted((REPORTS / "svg").glob("*.svg")),
            "tables": tables,
        },
        beside=tuple(path for name in ("report.md", "report.html", "cost.png") if (path := REPORTS / name).exists()),
        figures=tuple(n for n, a in study.ablations.items() if shown_tasks(study, a) and shown_variants(a)),
    )


def _shared_params(study: Study) -> dict[str, str]:
    return {**{key: f"{value:g}" for key, value in study.train.model_dump().items()}, "precision": study.precision}


def _model_params(study: Study, variant: str) -> dict[str, str]:
    """The same keys for every variant of the study: what a mixer does not have is `-`, as is what is switched off."""
    keys = dict.fromkeys(key for model in study.variants.values() for key in type(model).model_fields)
    model = study.variants[variant]
    values = model.model_dump()
    if isinstance(model, Hybrid):
        values["blocks"] = "; ".join(_block(block) for block in model.blocks)
    return {f"model.{key}": _shown(values.get(key)) for key in keys}


def _block(config: Model) -> str:
    """The mixer of a block, and what is said of it."""
    said = config.model_dump(exclude_defaults=True, exclude={"mixer", *OF_A_MODEL})
    return " ".join([config.mixer, *(f"{key}={value}" for key, value in said.items())])


def _shown(value: Any) -> str:
    return _OFF if value is None or value is False else str(value).lower()


def _curves(history: pd.DataFrame) -> Iterator[tuple[str, int, float]]:
    steps = history["step"].tolist()
    for column, name in CURVES.items():
        for step, value in zip(steps, history[column].tolist(), strict=True):
            if not math.isnan(value):
                yield name, step, value


def _over_seeds(history: pd.DataFrame) -> pd.DataFrame:
    """The mean curve; seeds that stopped early keep their last value."""
    import pandas as pd

    seeds = history.pivot(index="step", columns="seed", values=[*CURVES]).ffill()
    return pd.DataFrame({name: seeds[name].mean(axis=1) for name in CURVES}).reset_index()


def _scores(study: Study, task: str, scores: pd.DataFrame) -> Iterator[tuple[str, int, float]]:
    """Every test metric with the length as its step, and the primary one once more by name for each length of the tables.

    Of several seeds the mean, and with `_sd` the standard deviation.
    """
    from pipeline.storage.results import PRIMARY

    name = PRIMARY[study.tasks[task].data.goal]
    grouped = scores.dropna(subset="value").groupby(["metric", "length", "multiple"], sort=False)["value"]
    for ending, values in (("", grouped.mean()), ("_sd", grouped.std().dropna())):
        for (metric, length, multiple), value in values.items():
            yield f"test/{metric}{ending}", int(length), float(value)
            if metric == name and multiple in study.evaluate.multiples:
                yield f"{name}_{multiple:g}x{ending}", 0, float(value)


def _filters(filters: pd.DataFrame) -> Iterator[tuple[str, int, float]]:
    """A filter as a curve over how far back its taps are: `filter/1_k_0` is that of layer 1 on the keys of head 0."""
    names = filters["layer"].astype(str) + "_" + filters["stream"] + "_" + filters["row"].str.replace(">", "_to_")
    for name, lag, value in zip(names, filters["lag"], filters["value"], strict=True):
        yield f"filter/{name}", int(lag), float(value)


def _origin(task: str, variant: str) -> tuple[dict[str, str], float | None, float | None]:
    """Commit, start and duration, where this very result was trained here and not restored from a cache."""
    log = read_log(task, variant)
    if log is None:
        return {}, None, None
    origin = {"commit": log["commit"], "dirty": str(log["dirty"]).lower()} if log["commit"] else {}
    return origin, log["started"], log["seconds"]
