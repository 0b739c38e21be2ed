"""A tiny study in the working folder: the smoke preset with fewer tasks and steps."""

import shutil
from pathlib import Path

from ruamel.yaml import YAML

from pipeline.cli import main
from pipeline.config.grid import cells
from pipeline.config.load import load_study

ROOT = Path(__file__).parents[2]


def stage(*arguments):
    """Runs a command of `python -m pipeline` in this process."""
    main(arguments, standalone_mode=False)


def read_params():
    return YAML(typ="safe").load(Path("params.yaml"))


def write_params(raw):
    with Path("params.yaml").open("w") as file:
        YAML().dump(raw, file)


def edit(**changes):
    """Sets dotted keys of params.yaml."""
    raw = read_params()
    for dotted, value in changes.items():
        *path, last = dotted.split(".")
        at = raw
        for step in path:
            at = at[step]
        at[last] = value
    write_params(raw)


def finished_study(folder, *, tasks):
    """Every stage but the store of MLflow, for the tasks named, of which `copying` is one."""
    tiny_study(folder, tasks=tasks)
    stage("plan")
    for task in tasks:
        stage("generate", task)
    for cell in cells(load_study()):
        stage("train", cell.task, cell.variant)
    for task in tasks:
        stage("evaluate", task)
    stage("judge")
    stage("render")
    stage("report")


def tiny_study(folder, *, tasks):
    """The parameters and stages of a tiny study on the tasks named, of which `copying` is one."""
    shutil.copy(ROOT / "dvc.yaml", folder)
    shutil.copy(ROOT / "claims.yaml", folder)
    raw = YAML(typ="safe").load(ROOT / "presets" / "smoke.yaml")
    raw["threads"] = 1
    raw["tasks"] = {name: raw["tasks"][name] for name in tasks}
    for task in raw["tasks"].values():
        task["train"]["steps"] = 5
    raw["ablations"]["depth"]["tasks"] = ["copying"]
    for ablation in raw["ablations"].values():
        inside = not ablation["tasks"]  # of models that other questions train
        ablation["tasks"] = [task for task in ablation["tasks"] if task in tasks]
        ablation["across"] = [task for task in ablation.get("across", ()) if task in tasks]
        if not ablation["across" if inside else "tasks"]:
            ablation |= {"variants": [], "beside": [], "across": []}
    trained = {variant for ablation in raw["ablations"].values() for variant in ablation["variants"]}
    raw["variants"] = {name: line for name, line in raw["variants"].items() if name in trained}
    write_params(raw)
