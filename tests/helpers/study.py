"""A tiny study in the working directory: the smoke preset with fewer tasks and steps."""

import os
import shutil
from pathlib import Path

import pytest
from filelock import FileLock
from ruamel.yaml import YAML

from pipeline.cli import main
from pipeline.config.grid import cells
from pipeline.config.load import load_study

ROOT = Path(__file__).parents[2]


def stage(*arguments):
    """Run a command of `python -m pipeline` in this process."""
    main(arguments, standalone_mode=False)


def read_params():
    return YAML(typ="safe").load(Path("params.yaml"))


def write_params(raw):
    with Path("params.yaml").open("w") as file:
        YAML().dump(raw, file)


def edit(**changes):
    """Set dotted keys of params.yaml."""
    raw = read_params()
    for dotted, value in changes.items():
        *path, last = dotted.split(".")
        owner = raw
        for key in path:
            owner = owner[key]
        owner[last] = value
    write_params(raw)


def keep_ablation(name, *, tasks, variants):
    """Switch off all ablations but one, which trains `variants` on `tasks`."""
    raw = read_params()
    ablation = {key: raw["ablations"][name][key] for key in ("question", "plot")}
    raw["ablations"] = {other: {"tasks": [], "variants": []} for other in raw["ablations"]}
    raw["ablations"][name] = ablation | {"tasks": tasks, "variants": variants}
    raw["variants"] = {variant: raw["variants"][variant] for variant in variants}
    write_params(raw)


def shared_study(temporary, *, tasks):
    """Return the folder of a `finished_study`, made once for all test processes. A test must change only a copy of it.

    `temporary` is pytest's tmp_path_factory.
    """
    base = temporary.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "-".join(["finished", *tasks])
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            part = folder.with_suffix(".part")
            part.mkdir()
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(part)
                finished_study(part, tasks=tasks)
            part.rename(folder)
    return folder


def finished_study(folder, *, tasks):
    """Run every stage except `track` on `tasks`, which must contain `copying`.

    There are no checkpoints, as in a new clone: training a cell again trains all its runs.
    """
    tiny_study(folder, tasks=tasks)
    stage("plan")
    for task in tasks:
        stage("generate", task)
    for cell in cells(load_study()):
        stage("train", cell.task, cell.variant)
    for task in tasks:
        stage("evaluate", task)
    shutil.rmtree("checkpoints")
    stage("judge")
    stage("render")
    stage("report")


def tiny_study(folder, *, tasks):
    """Write the parameters and stages of a tiny study on `tasks`, which must contain `copying`."""
    shutil.copy(ROOT / "dvc.yaml", folder)
    shutil.copy(ROOT / "claims.yaml", folder)
    raw = YAML(typ="safe").load(ROOT / "presets" / "smoke.yaml")
    raw["parallel_runs"] = 1
    raw["tasks"] = {name: raw["tasks"][name] for name in tasks}
    raw["defaults"]["training"]["steps"] = 5
    for task in raw["tasks"].values():
        task.get("training", {}).pop("steps", None)
    raw["ablations"]["depth"]["tasks"] = ["copying"]
    for name, ablation in raw["ablations"].items():
        trains = "tasks" in ablation
        for key in ("tasks", "reference_tasks"):
            if key in ablation:
                ablation[key] = [task for task in ablation[key] if task in tasks]
        ablation.pop("reference_lines", None)
        if not ablation.get("tasks" if trains else "reference_tasks"):
            raw["ablations"][name] = {"tasks": [], "variants": []}
    trained = {variant for ablation in raw["ablations"].values() for variant in ablation.get("variants", ())}
    raw["variants"] = {name: config for name, config in raw["variants"].items() if name in trained}
    write_params(raw)
