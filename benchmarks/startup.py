"""Overhead of DVC and Python: seconds before a cell is trained, and seconds if there is nothing to do.

Measured in a temporary project with this code and a study like presets/smoke.yaml with one step per run.
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

from benchmarks.measure import REPEATS, SECONDS, Benchmark, Comparison, Figure, Place, make_figure
from pipeline.storage.files import read_json

ROOT = Path(__file__).parent.parent
CELL_TARGET, REST_TARGET, STATUS_TARGET = 3, 5, 3
CELL = ("ar", "k")

CLOCK = """
import resource, subprocess, sys, time
start = time.perf_counter()
done = subprocess.run(sys.argv[1:], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
unit = 1 if sys.platform == "darwin" else 1024
print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit, done.stdout)
sys.exit(done.stdout if done.returncode else 0)
"""
"""Runs a command from a small process; prints its seconds, the bytes of its largest process and its output."""


class Run(NamedTuple):
    """One run of a command, with the peak memory of its largest process."""

    seconds: float
    bytes: int
    output: str


def startup(*, cells: int = 100) -> Benchmark:
    """Compare the overhead of one cell with and without DVC, and two ways to reproduce a finished study."""

    def figures(place: Place) -> Iterator[Figure]:
        task, variant = CELL
        with tempfile.TemporaryDirectory() as scratch:
            study, empty = finished_study(Path(scratch, "study"), cells, place), empty_study(Path(scratch, "empty"))
            force = ("repro", "--force", "--single-item")
            yield in_turn(
                Comparison(
                    name="before a cell is trained by DVC",
                    sides=("dvc repro of a cell, less its training", "dvc repro of an empty stage"),
                    unit=SECONDS,
                    target=CELL_TARGET,
                ),
                lambda: less_training(study, dvc(study, *force, f"train_qkv_subsets@{task}-{variant}")),
                lambda: dvc(empty, *force, "empty"),
            )
            yield in_turn(
                Comparison(
                    name="the same without DVC",
                    sides=("python -m pipeline train, less its training", "python -c pass"),
                    unit=SECONDS,
                ),
                lambda: less_training(study, python(study, "-m", "pipeline", "train", task, variant)),
                lambda: python(empty, "-c", "pass"),
            )
            yield in_turn(
                Comparison(
                    name="nothing to do",
                    sides=(f"dvc repro, {cells} cells", "dvc repro, one stage"),
                    unit=SECONDS,
                    target=REST_TARGET,
                ),
                lambda: at_rest(dvc(study, "repro")),
                lambda: dvc(empty, "repro"),
            )
            yield in_turn(
                Comparison(
                    name="look for changes",
                    sides=(f"dvc status, {cells} cells", "dvc status, one stage"),
                    unit=SECONDS,
                    target=STATUS_TARGET,
                ),
                lambda: dvc(study, "status"),
                lambda: dvc(empty, "status"),
            )
            yield in_turn(
                Comparison(
                    name="nothing to do, by `python -m pipeline run`",
                    sides=(f"python -m pipeline run, {cells} cells", "dvc repro, one stage"),
                    unit=SECONDS,
                ),
                lambda: at_rest(python(study, "-m", "pipeline", "run")),
                lambda: dvc(empty, "repro"),
            )

    return Benchmark(
        what="Seconds around the work: before a cell is trained, and with nothing to do",
        target=f"{CELL_TARGET} s before a cell, {REST_TARGET} s for nothing, {STATUS_TARGET} s for the status, at {cells} cells",
        figures=figures,
    )


def in_turn(comparison: Comparison, ours: Callable[[], Run], other: Callable[[], Run]) -> Figure:
    """Run both commands in turn, once for warm-up and then REPEATS times."""
    first, second = zip(*[(ours(), other()) for _ in range(REPEATS + 1)][1:], strict=True)
    times = ([run.seconds for run in runs] for runs in (first, second))
    return make_figure(comparison, *times, memory=[max(run.bytes for run in runs) for runs in (first, second)])


def less_training(study: Path, run: Run) -> Run:
    """Subtract the training time, which the log of the cell records."""
    task, variant = CELL
    return run._replace(seconds=run.seconds - read_json(study / "logs" / task / f"{variant}.json")["seconds"])


def at_rest(run: Run) -> Run:
    """Return `run`. Raises RuntimeError if a stage ran, since there was nothing to do."""
    if stages := set(re.findall(r"Running stage '([^']+)'", run.output)):
        raise RuntimeError(f"{', '.join(sorted(stages))} ran although there was nothing to do")
    return run


def empty_study(folder: Path) -> Path:
    begin(folder)
    (folder / "dvc.yaml").write_text("stages: {empty: {cmd: python -c pass}}\n")
    dvc(folder, "repro")
    return folder


def finished_study(folder: Path, cells: int, place: Place) -> Path:
    """Create a study of `cells` cells and run it."""
    begin_study(folder, lambda smoke: enlarged(smoke, cells, place))
    python(folder, "-m", "pipeline", "run")
    return folder


def begin_study(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Create a project with the code, the stages and the smoke study after `change`; run nothing."""
    begin(folder)
    for name in ("cat", "pipeline"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("dvc.yaml", "claims.yaml", ".dvcignore", ".gitignore"):
        shutil.copy(ROOT / name, folder)
    with (folder / "params.yaml").open("w") as file:
        YAML().dump(change(YAML(typ="safe").load(ROOT / "presets" / "smoke.yaml")), file)


def enlarged(study: dict[str, Any], cells: int, place: Place) -> dict[str, Any]:
    """Set one step per run and copy a variant until the study has `cells` cells."""
    study |= {"device": place.device, "parallel_runs": place.threads}
    study["defaults"]["training"]["steps"] = 1
    for section in study["tasks"].values():
        section.get("training", {}).pop("steps", None)
    ablation = study["ablations"]["qkv_subsets"]
    missing = cells - sum(len(a.get("tasks", ())) * len(a.get("variants", ())) for a in study["ablations"].values())
    copies = [f"copy_{n}" for n in range(max(0, -(-missing // len(ablation["tasks"]))))]
    study["variants"] |= {name: dict(study["variants"][CELL[1]]) for name in copies}
    ablation["variants"] += copies
    return study


def begin(folder: Path) -> None:
    """Create a Git and DVC project with the DVC configuration of this repository."""
    folder.mkdir()
    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)
    dvc(folder, "init", "--quiet")
    shutil.copy(ROOT / ".dvc" / "config", folder / ".dvc")


def dvc(folder: Path, *arguments: str) -> Run:
    return python(folder, "-m", "dvc", *arguments)


def python(folder: Path, *arguments: str) -> Run:
    """Run Python with `arguments` in `folder`. Raises RuntimeError with its output if it fails."""
    scripts = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}", "MLFLOW_DISABLE_TELEMETRY": "true"}
    command = [sys.executable, "-c", CLOCK, sys.executable, *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"python {' '.join(arguments)}: {done.stderr}")
    seconds, size, output = done.stdout.split(" ", 2)
    return Run(float(seconds), int(size), output)
