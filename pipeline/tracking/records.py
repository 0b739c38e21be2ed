"""What MLflow shows, as plain records: one Record per run. Nothing here imports MLflow."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cat.config import MixerConfig, ModelConfig
from cat.mixers.registry import CONSTRUCTION
from pipeline.config.grid import (
    cells,
    seeds_of,
    seeds_text,
    shown_tasks,
    shown_variants,
    variant_keys,
    variant_value,
    variants_on,
)
from pipeline.config.outputs import REPORT_EXPERIMENT
from pipeline.config.study import Study
from pipeline.storage import runs
from pipeline.storage.files import read_json
from pipeline.storage.paths import DATA, REPORTS, RESULTS, VERDICTS
from pipeline.storage.provenance import provenance
from pipeline.storage.training_log import TABLE, read_log

if TYPE_CHECKING:
    import pandas as pd


CURVES = {
    "train_loss": "train/loss",
    "max_loss": "train/max_loss",
    "grad_norm": "train/grad_norm",
    "valid_loss": "valid/loss",
    "valid_accuracy": "valid/accuracy",
    "max_logit": "attention/max_logit",
}
"""Column of history.csv -> name of the MLflow metric."""
BY_LENGTH = "_by_length"
"""Ending of a test metric whose step is the length."""
_OFF = "-"

MetricValue = tuple[str, int, float]
"""Name, step and value."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """Everything that is logged in one run."""

    experiment: str
    kind: Literal["report", "variant", "seed"]
    name: str
    note: str
    params: dict[str, str]
    tags: dict[str, str]
    metrics: list[MetricValue]
    files: dict[str, list[Path]]
    """Artifact folder -> files."""
    figures: tuple[str, ...]
    """The ablations whose figures show the run."""
    parent: str | None = None
    """For a seed: the key of its variant's run, which contains it in the pages."""
    volatile_files: tuple[Path, ...] = ()
    """Files with times or commits in them: logged, but not part of the digest."""
    origin: dict[str, str] = field(default_factory=dict)
    """The commit that trained it, or for the report that logged it, if known."""
    dataset: dict[str, str] | None = None
    seconds: float | None = None
    started: float | None = None
    context: str = field(default_factory=lambda: os.environ.get("DVC_EXP_NAME", ""))
    """The DVC experiment; empty for the workspace."""

    @cached_property
    def content_digest(self) -> str:
        """A digest of everything except time, place, commit and DVC experiment."""
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
        """The tag that finds the run. Each DVC experiment has a run of its own for the same content."""
        return self.key_in(self.context)

    def key_in(self, context: str) -> str:
        """The tag of a run with the same content in another DVC experiment; empty for the workspace."""
        return hashlib.sha256(f"{self.content_digest} {context}".encode()).hexdigest()[:32]


def task_records(study: Study) -> Iterator[Record]:
    """Yield a record per variant, followed by the records of its seeds, task by task."""
    from pipeline.storage.results import read_filters, read_results

    results = read_results(study)
    for task in study.tasks:
        filters = read_filters(task)
        scores = results[results["task"] == task]
        for variant in variants_on(study, task):
            yield from _cell_records(
                study, task, variant, scores[scores["variant"] == variant], filters[filters["variant"] == variant]
            )


def _cell_records(study: Study, task: str, variant: str, scores: pd.DataFrame, filters: pd.DataFrame) -> Iterator[Record]:
    from pipeline.reporting.labels import task_label, variant_label, with_slug
    from pipeline.storage.results import read_history

    meta = DATA / task / "meta.json"
    dataset_kind = read_json(meta)["kind"]
    data_digest = hashlib.sha256(meta.read_bytes()).hexdigest()[:16]
    summary = runs.read_summary(task, variant)
    history = read_history(study, task, variant, summary["learning_rate"])
    cell_seeds = seeds_of(study, task, variant)
    chosen = [r for r in summary["runs"] if r["learning_rate"] == summary["learning_rate"] and r["seed"] in cell_seeds]
    origin, started, seconds = _origin(task, variant)
    common: dict[str, Any] = {
        "experiment": task,
        "figures": tuple(
            name
            for name, ablation in study.ablations.items()
            if task in shown_tasks(study, ablation) and variant in shown_variants(ablation)
        ),
        "origin": origin,
        "dataset": {"name": task, "digest": data_digest, "path": str(DATA / task), "kind": dataset_kind},
        "started": started,
        "seconds": seconds,
    }
    label = variant_label(study, variant)
    params = {"task": task, "variant": variant, "label": label, **_cell_params(study, task, variant, summary)}
    tags = {
        "task": task,
        "variant": variant,
        "label": label,
        "device": summary["device"],
        "data_digest": data_digest,
        "dvc.stage": next(f"train_{c.ablation}@{task}-{variant}" for c in cells(study) if (c.task, c.variant) == (task, variant)),
        "dvc.md5": dvc_md5(runs.folder(task, variant)),
    }
    name, seeds = with_slug(label, variant), ", ".join(map(str, cell_seeds))
    subject = f"`{variant}` ({label}) on `{task}` ({task_label(study, task)})"
    mean = Record(
        kind="variant",
        name=name,
        note=f"{subject}: mean over seeds {seeds}; `..._sd` is the standard deviation.",
        params={**params, "seed": f"mean of {seeds}"},
        tags={**tags, "seed": f"mean of {seeds}", "diverged": str(sum(run["stop"] == "diverged" for run in chosen))},
        metrics=[*_curves(_mean_over_seeds(history)), *_scores(study, task, scores)],
        files={"": [runs.folder(task, variant) / "summary.json", runs.folder(task, variant) / "history.csv"]},
        **common,
    )
    yield mean
    for run in sorted(chosen, key=lambda run: cell_seeds.index(run["seed"])):
        seed = run["seed"]
        weights = runs.weights_path(task, variant, seed)
        yield Record(
            kind="seed",
            parent=mean.key,
            name=f"{name} seed {seed}",
            note=f"{subject}, seed {seed}: stopped by {run['stop']} after {run['steps']} steps.",
            params={**params, "seed": str(seed)},
            tags={
                **tags,
                "seed": str(seed),
                "stop": run["stop"],
                "solves_every_length": _param_value(run["solves_every_length"]),
            },
            metrics=[
                *_curves(history[history["seed"] == seed]),
                *_scores(study, task, scores[scores["seed"] == seed]),
                *_filters(filters[filters["seed"] == seed]),
                ("steps_run", 0, float(run["steps"])),
            ],
            files={"weights": [weights] if weights.exists() else []},
            **common,
        )


def dvc_md5(folder: Path) -> str:
    """Compute the md5 that dvc.lock has for a folder: a digest of its list of files."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    listed = [
        {"md5": hashlib.md5(path.read_bytes()).hexdigest(), "relpath": path.relative_to(folder).as_posix()} for path in files
    ]
    return hashlib.md5(json.dumps(listed, sort_keys=True).encode()).hexdigest() + ".dir"


def report_record(study: Study) -> Record:
    """Describe the report: figures, tables and verdicts of the whole study."""
    from pipeline.reporting.markdown import escape
    from pipeline.reporting.verdicts import read_verdicts

    # A folder each, because the tables of a task have the same file name.
    tables: dict[str, list[Path]] = {}
    for table in sorted({*REPORTS.glob("*.csv"), *RESULTS.rglob("*.csv"), *VERDICTS.glob("*.csv")} - {TABLE}):
        tables.setdefault(f"tables/{table.parent.as_posix()}", []).append(table)
    verdicts = [f"* {row.verdict}: {escape(row.statement)}" for row in read_verdicts().itertuples()]
    return Record(
        experiment=REPORT_EXPERIMENT,
        kind="report",
        name="report",
        note="\n".join(verdicts) or "No claims were judged.",
        params={"seeds": seeds_text(study), "tasks": ", ".join(study.tasks), "variants": str(len(study.variants))},
        tags={},
        origin=_commit_tags(provenance()),
        metrics=[],
        files={
            "": [path for path in (Path("params.yaml"), Path("claims.yaml"), REPORTS / "report.md") if path.exists()],
            "figures": sorted((REPORTS / "figures").glob("*.svg")),
            **tables,
        },
        volatile_files=tuple(path for path in (REPORTS / "report.html", TABLE) if path.exists()),
        figures=tuple(
            name for name, ablation in study.ablations.items() if shown_tasks(study, ablation) and shown_variants(ablation)
        ),
    )


def _cell_params(study: Study, task: str, variant: str, summary: Mapping[str, Any]) -> dict[str, str]:
    section = study.tasks[task]
    return {
        **_model_params(study, variant),
        "learning_rate": f"{summary['learning_rate']:g}",
        "parameters": str(summary["parameters"]),
        **{key: _param_value(value) for key, value in study.training[task, variant].run.items()},
        "precision": study.precision,
        **{f"data.{key}": str(value) for key, value in section.data.model_dump(mode="json").items()},
    }


def _model_params(study: Study, variant: str) -> dict[str, str]:
    """Every variant has the same keys; a key that its mixer lacks, or that is off, is `-`."""
    keys = dict.fromkeys(chain(["mixer"], *(variant_keys(study, other) for other in study.variants)))
    model, own = study.variants[variant], variant_keys(study, variant)
    values = {key: variant_value(study, variant, key) for key in own}
    if isinstance(model, ModelConfig):
        values["mixer"] = "; ".join(map(_mixer_params, model.mixers)) if len(model.mixers) > 1 else model.mixers[0].mixer
    else:
        values["mixer"] = CONSTRUCTION
    return {f"model.{key}": _param_value(values.get(key)) for key in keys}


def _mixer_params(config: MixerConfig) -> str:
    changed = config.model_dump(exclude_defaults=True, exclude={"mixer"})
    return " ".join([config.mixer, *(f"{key}={value}" for key, value in changed.items())])


def _param_value(value: Any) -> str:
    if value is None or value is False:
        return _OFF
    return f"{value:g}" if isinstance(value, float) else str(value).lower()


def _curves(history: pd.DataFrame) -> Iterator[MetricValue]:
    steps = history["step"].tolist()
    for column, name in CURVES.items():
        for step, value in zip(steps, history[column].tolist(), strict=True):
            if not math.isnan(value):
                yield name, step, value


def _mean_over_seeds(history: pd.DataFrame) -> pd.DataFrame:
    """Average the curves; a seed that stopped early keeps its last value."""
    import pandas as pd

    seeds = history.pivot(index="step", columns="seed", values=[*CURVES]).ffill()
    return pd.DataFrame({name: seeds[name].mean(axis=1) for name in CURVES}).reset_index()


def _scores(study: Study, task: str, scores: pd.DataFrame) -> Iterator[MetricValue]:
    """Yield every test metric at the training length, and by length with the length as its step.

    MLflow's tables show the value of the last step only. So the primary metric is repeated as e.g. `accuracy_8x` for each length
    of the tables. Several seeds give the mean and, with the ending `_sd`, the standard deviation.
    """
    from pipeline.storage.tables import PRIMARY

    name = PRIMARY[study.tasks[task].data.goal]
    grouped = scores.dropna(subset="value").groupby(["metric", "length", "multiple"], sort=False)["value"]
    for ending, values in (("", grouped.mean()), ("_sd", grouped.std().dropna())):
        for (metric, length, multiple), value in values.items():
            yield f"test/{metric}{BY_LENGTH}{ending}", int(length), float(value)
            if multiple == 1:
                yield f"test/{metric}{ending}", 0, float(value)
            if metric == name and multiple in study.evaluate.multiples:
                yield f"{name}_{multiple:g}x{ending}", 0, float(value)


def _filters(filters: pd.DataFrame) -> Iterator[MetricValue]:
    """Yield each kernel with the lag as its step: `filter/1_k_0` is layer 1, projection K, head 0."""
    names = filters["layer"].astype(str) + "_" + filters["projection"] + "_" + filters["head"].str.replace(">", "_to_")
    for name, lag, value in zip(names, filters["lag"], filters["value"], strict=True):
        yield f"filter/{name}", int(lag), float(value)


def _origin(task: str, variant: str) -> tuple[dict[str, str], float | None, float | None]:
    """Commit, start and duration; unknown if the result was restored from a cache instead of trained here."""
    log = read_log(task, variant)
    if log is None:
        return {}, None, None
    return _commit_tags(log), log["started"], log["seconds"]


def _commit_tags(origin: Mapping[str, Any]) -> dict[str, str]:
    return {"commit": origin["commit"], "dirty": str(origin["dirty"]).lower()} if origin["commit"] else {}
