"""What DVC and Python cost around the work: before a cell is trained, and where there is nothing to do.

Measured in a temporary project with this code and a study like presets/smoke.yaml, of one step a run and as many cells as asked.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ruamel.yaml import YAML

from benchmarks.measure import REPEATS, SECONDS, Benchmark, Figure, Place, Question, answer
from pipeline.storage.files import read_json

ROOT = Path(__file__).parent.parent
CELL_TARGET, REST_TARGET = 3, 5
CELL = ("ar", "k")

CLOCK = """
import resource, subprocess, sys, time
start = time.perf_counter()
done = subprocess.run(sys.argv[1:], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
unit = 1 if sys.platform == "darwin" else 1024
print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit, done.stdout)
sys.exit(done.stdout if done.returncode else 0)
"""
"""Runs a command from a small process: seconds, bytes of the largest process in it, and what it says."""


class Run(NamedTuple):
    """One run of a command."""

    seconds: float
    bytes: int
    output: str


def startup(*, cells: int = 100) -> Benchmark:
    """The command of a cell with and without DVC, less what its training took, and both ways of reproducing a finished study."""

    def figures(place: Place) -> Iterator[Figure]:
        task, variant = CELL
        with tempfile.TemporaryDirectory() as scratch:
            study, empty = finished_study(Path(scratch, "study"), cells, place), empty_study(Path(scratch, "empty"))
            force = ("repro", "--force", "--single-item")
            yield in_turn(
                Question(
                    name="before a cell is trained by DVC",
                    sides=("dvc repro of a cell, less its training", "dvc repro of an empty stage"),
                    unit=SECONDS,
                    target=CELL_TARGET,
                ),
                lambda: less_training(study, dvc(study, *force, f"train_streams@{task}-{variant}")),
                lambda: dvc(empty, *force, "empty"),
            )
            yield in_turn(
                Question(
                    name="the same without DVC",
                    sides=("python -m pipeline train, less its training", "python -c pass"),
                    unit=SECONDS,
                ),
                lambda: less_training(study, python(study, "-m", "pipeline", "train", task, variant)),
                lambda: python(empty, "-c", "pass"),
            )
            yield in_turn(
                Question(
                    name="nothing to do",
                    sides=(f"dvc repro, {cells} cells", "dvc repro, one stage"),
                    unit=SECONDS,
                    target=REST_TARGET,
                ),
                lambda: at_rest(dvc(study, "repro")),
                lambda: dvc(empty, "repro"),
            )
            yield in_turn(
                Question(
                    name="the same by `python -m pipeline run`",
                    sides=(f"python -m pipeline run, {cells} cells", "dvc repro, one stage"),
                    unit=SECONDS,
                ),
                lambda: at_rest(python(study, "-m", "pipeline", "run")),
                lambda: dvc(empty, "repro"),
            )

    return Benchmark(
        what="Seconds around the work: before a cell is trained, and with nothing to do",
        target=f"{CELL_TARGET} s before a cell, {REST_TARGET} s for nothing at {cells} cells",
        figures=figures,
    )


def in_turn(question: Question, ours: Callable[[], Run], other: Callable[[], Run]) -> Figure:
    """Both commands in turn, after once for warming up."""
    first, second = zip(*[(ours(), other()) for _ in range(REPEATS + 1)][1:], strict=True)
    times = ([run.seconds for run in runs] for runs in (first, second))
    return answer(question, *times, memory=[max(run.bytes for run in runs) for runs in (first, second)])


def less_training(study: Path, run: Run) -> Run:
    """What is left of the seconds without those that the cell wrote into its log."""
    task, variant = CELL
    return run._replace(seconds=run.seconds - read_json(study / "logs" / task / f"{variant}.json")["seconds"])


def at_rest(run: Run) -> Run:
    """Raises RuntimeError where a stage ran that had nothing to do."""
    if ran := set(re.findall(r"Running stage '([^']+)'", run.output)):
        raise RuntimeError(f"{', '.join(sorted(ran))} ran where there was nothing to do")
    return run


def empty_study(folder: Path) -> Path:
    begin(folder)
    (folder / "dvc.yaml").write_text("stages: {empty: {cmd: python -c pass}}\n")
    dvc(folder, "repro")
    return folder


def finished_study(folder: Path, cells: int, place: Place) -> Path:
    """A study of `cells` cells in which everything is done."""
    begin_study(folder, lambda smoke: enlarged(smoke, cells, place))
    python(folder, "-m", "pipeline", "run")
    return folder


def begin_study(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """A project with the code, the stages and what `change` makes of the smoke study, nothing run."""
    begin(folder)
    for name in ("cat", "pipeline"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("dvc.yaml", "claims.yaml", ".dvcignore", ".gitignore"):
        shutil.copy(ROOT / name, folder)
    with (folder / "params.yaml").open("w") as file:
        YAML().dump(change(YAML(typ="safe").load(ROOT / "presets" / "smoke.yaml")), file)


def enlarged(study: dict[str, Any], cells: int, place: Place) -> dict[str, Any]:
    """The study with one step a run, and with copies of a variant that bring it to as many cells."""
    study |= {"device": place.device, "threads": place.threads}
    for task in study["tasks"].values():
        task["train"]["steps"] = 1
    streams = study["ablations"]["streams"]
    missing = cells - sum(len(a["tasks"]) * len(a["variants"]) for a in study["ablations"].values())
    copies = [f"copy_{n}" for n in range(max(0, -(-missing // len(streams["tasks"]))))]
    study["variants"] |= {name: dict(study["variants"][CELL[1]]) for name in copies}
    streams["variants"] += copies
    return study


def begin(folder: Path) -> None:
    """A new project of Git and DVC, with what this repository tells DVC."""
    folder.mkdir()
    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)
    dvc(folder, "init", "--quiet")
    shutil.copy(ROOT / ".dvc" / "config", folder / ".dvc")


def dvc(folder: Path, *arguments: str) -> Run:
    return python(folder, "-m", "dvc", *arguments)


def python(folder: Path, *arguments: str) -> Run:
    """Runs Python with `arguments` in `folder`. Raises RuntimeError with its output where it fails."""
    here = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{here}{os.pathsep}{os.environ['PATH']}", "MLFLOW_DISABLE_TELEMETRY": "true"}
    command = [sys.executable, "-c", CLOCK, sys.executable, *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"python {' '.join(arguments)}: {done.stderr}")
    seconds, size, output = done.stdout.split(" ", 2)
    return Run(float(seconds), int(size), output)
