"""What is logged: a record for each MLflow run."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cat.config import ModelConfig
from cat.mixers.registry import MODEL_KEYS, HybridConfig
from pipeline.config.grid import cells, shown_tasks, shown_variants, variants_on
from pipeline.config.study import Study
from pipeline.storage import runs
from pipeline.storage.files import read_json
from pipeline.storage.paths import DATA, REPORTS, RESULTS, VERDICTS
from pipeline.storage.training_log import read_log

if TYPE_CHECKING:
    import pandas as pd


STUDY = "study"
"""The experiment that holds the run of the report."""
CURVES = {
    "train_loss": "train/loss",
    "max_loss": "train/max_loss",
    "grad_norm": "train/grad_norm",
    "valid_loss": "valid/loss",
    "valid_accuracy": "valid/accuracy",
    "max_logit": "attention/max_logit",
}
"""How a column of a history is called here."""
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
    parent: str | None = None
    """The key of the variant's run that a seed's run is shown in."""
    volatile_files: tuple[Path, ...] = ()
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
                "steps": str(section.training.steps),
                "batch": str(section.training.batch),
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
                    parent=whole_cell.key,
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
    verdicts = [f"* {row.verdict}: {row.statement}" for row in read_verdicts().itertuples()]
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
        volatile_files=tuple(path for name in ("report.md", "report.html", "cost.png") if (path := REPORTS / name).exists()),
        figures=tuple(n for n, a in study.ablations.items() if shown_tasks(study, a) and shown_variants(a)),
    )


def _shared_params(study: Study) -> dict[str, str]:
    return {**{key: f"{value:g}" for key, value in study.optimizer.model_dump().items()}, "precision": study.precision}


def _model_params(study: Study, variant: str) -> dict[str, str]:
    """The same keys for every variant of the study: what a mixer does not have is `-`, as is what is switched off."""
    keys = dict.fromkeys(key for model in study.variants.values() for key in type(model).model_fields)
    model = study.variants[variant]
    values = model.model_dump()
    if isinstance(model, HybridConfig):
        values["blocks"] = "; ".join(_block(block) for block in model.blocks)
    return {f"model.{key}": _shown(values.get(key)) for key in keys}


def _block(config: ModelConfig) -> str:
    """The mixer of a block, and what is said of it."""
    said = config.model_dump(exclude_defaults=True, exclude={"mixer", *MODEL_KEYS})
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
    names = filters["layer"].astype(str) + "_" + filters["projection"] + "_" + filters["head"].str.replace(">", "_to_")
    for name, lag, value in zip(names, filters["lag"], filters["value"], strict=True):
        yield f"filter/{name}", int(lag), float(value)


def _origin(task: str, variant: str) -> tuple[dict[str, str], float | None, float | None]:
    """Commit, start and duration, where this very result was trained here and not restored from a cache."""
    log = read_log(task, variant)
    if log is None:
        return {}, None, None
    origin = {"commit": log["commit"], "dirty": str(log["dirty"]).lower()} if log["commit"] else {}
    return origin, log["started"], log["seconds"]
