"""python -m benchmarks.cells: the overhead per cell besides training, by number of cells, extrapolated to 10,000 cells.

The cells are trivial: each gets the result of one trained run. Each number of cells is measured in its own project and process,
with a Ray cluster on this machine. The extrapolation uses the last two numbers: the power law through them, or the line if that
gives more.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from tabulate import tabulate

from benchmarks.measure import peak_memory
from benchmarks.startup import ROOT, begin_study
from benchmarks.suite import RESULTS, number, slug
from pipeline.config.grid import variants_on
from pipeline.config.load import load_study
from pipeline.runtime.devices import describe
from pipeline.runtime.workers import Report
from pipeline.scheduling import ray_cluster, scheduler
from pipeline.scheduling.dvc_internals import reproduce
from pipeline.stages.evaluate import evaluate
from pipeline.stages.judge import judge
from pipeline.stages.train import Cell, Job, Trained, train_jobs, write
from pipeline.storage.files import atomic_write, write_json
from pipeline.storage.provenance import provenance
from pipeline.tracking.sync import track

SIZES = (10, 100, 500)
FAR = 10_000
TASK, VARIANT = "ar", "k"
SEEDS = (0, 1, 2)
CPU = torch.device("cpu")
PARTS = {
    "stale": "DVC: find stale cells when all are",
    "ray": "Ray: send a job per seed and return its result",
    "write": "files: weights, history and summary of each cell",
    "record": "DVC: record the cells, write the lock file once",
    "rest": "DVC: find stale cells when none is",
    "evaluate": "the smallest evaluation, of every seed",
    "mlflow": "MLflow: log a run per seed",
    "look": "MLflow: check that all runs are logged",
}


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("sizes", nargs=-1, type=click.IntRange(min=1))
def main(sizes: tuple[int, ...]) -> None:
    """Measure studies of SIZES cells, at least two sizes, by default 10, 100 and 500.

    Writes benchmarks/results/cells_<device>.json and .md.
    """
    chosen = sorted(set(sizes)) or list(SIZES)
    if len(chosen) < 2:
        raise click.UsageError("the extrapolation needs at least two sizes")
    device = describe(CPU)
    results: dict[str, Any] = {"device": device, "torch": torch.__version__, "seeds": len(SEEDS), "sizes": {}}
    path = RESULTS / f"cells_{slug(device)}.json"
    for size in chosen:
        click.echo(f"{size} cells ..", err=True)
        results["sizes"][str(size)] = in_project(size)
    with atomic_write(path) as part:
        write_json(part, results)
    with atomic_write(path.with_suffix(".md")) as part:
        part.write_text(table(results) + "\n", encoding="utf-8")
    click.echo(table(results))


def in_project(size: int) -> dict[str, float]:
    """Measure the seconds of each part and the peak memory in a temporary project. Raises RuntimeError if it fails."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "study")
        begin_study(folder, lambda smoke: trivial(smoke, size))
        scripts = Path(sys.executable).parent
        environment = {
            **os.environ,
            "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }
        command = [sys.executable, "-c", "from benchmarks.cells import measure; measure('figures.json')"]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{size} cells: {done.stdout}{done.stderr}")
        figures: dict[str, float] = json.loads((folder / "figures.json").read_text())
        return figures


def trivial(study: dict[str, Any], cells: int) -> dict[str, Any]:
    """Reduce the study to one task and copies of one variant, with one step per run."""
    names = [VARIANT, *(f"copy_{n}" for n in range(1, cells))]
    study |= {"device": "cpu", "tasks": {TASK: study["tasks"][TASK]}}
    study["tasks"][TASK]["training"] = {"steps": 1, "learning_rates": [0.01], "seeds": list(SEEDS)}
    study["variants"] = {name: dict(study["variants"][VARIANT]) for name in names}
    trained = {"question": "What does a cell cost?", "tasks": [TASK], "variants": names, "plot": "lines"}
    study["ablations"] = {name: {"tasks": [], "variants": []} for name in study["ablations"]} | {"qkv_subsets": trained}
    return study


def measure(path: str) -> None:
    """Measure every part in turn in the working folder and write the figures to `path`."""
    figures: dict[str, float] = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        outcome = work()
        figures[name] = time.perf_counter() - start
        return outcome

    reproduce(scheduler.FIRST)
    study = load_study()
    stale = timed("stale", scheduler.stale_cells)
    cells = [stage.cell for stage in stale]
    (trained,) = train_jobs(cells[0], (cells[0].jobs[0],), CPU, lambda message: None)
    jobs = [(cell, (job,)) for cell in cells for job in cell.jobs]
    with ray_cluster.join("local", study) as joined:

        def send(jobs: list[tuple[Cell, tuple[Job, ...]]]) -> dict[int, list[Trained]]:
            tasks = [TASK] * len(jobs)
            return dict(joined.run_jobs(partial(given, trained), jobs, tasks=tasks, report=lambda index, message: None))

        send(jobs[: 4 * joined.size])  # warm-up: processes start and import torch
        outcomes = timed("ray", lambda: send(jobs))
    timed("write", lambda: write_all(cells, [run for index in range(len(jobs)) for run in outcomes[index]]))
    declared = {stage.stage: stage.declared for stage in stale}
    timed("record", lambda: reproduce(declared, declared))
    if timed("rest", scheduler.stale_cells):
        raise RuntimeError("recorded cells are stale")
    settings = {variant: study.training[TASK, variant] for variant in variants_on(study, TASK)}
    timed("evaluate", lambda: evaluate(TASK, settings, study.precision, device="cpu", parallel_runs="auto"))
    judge(study, {})  # MLflow logs the verdicts too
    timed("mlflow", lambda: track(study))
    timed("look", lambda: track(study))
    figures["bytes"] = peak_memory()
    write_json(Path(path), figures)


def given(trained: Trained, cell_and_jobs: tuple[Cell, tuple[Job, ...]], device: torch.device, report: Report) -> list[Trained]:
    """Return the given result for each run of a trivial cell."""
    return [trained._replace(job=job) for job in cell_and_jobs[1]]


def write_all(cells: list[Cell], runs: list[Trained]) -> None:
    origin = provenance()
    for index, cell in enumerate(cells):
        write(cell, runs[index * len(SEEDS) : (index + 1) * len(SEEDS)], began=time.time(), origin=origin)


def table(results: dict[str, Any]) -> str:
    """Format one row per part: seconds per number of cells, power of the growth, and the extrapolation."""
    sizes = {int(size): figures for size, figures in results["sizes"].items()}
    rows = []
    for part, description in PARTS.items():
        seconds = [figures[part] for figures in sizes.values()]
        power, far = extrapolate(list(sizes), seconds)
        rows.append([description, *map(number, seconds), f"{power:.2f}", duration(far)])
    memory = [figures["bytes"] for figures in sizes.values()]
    power, far = extrapolate(list(sizes), memory)
    rows.append(["peak memory, MB", *(number(size / 1e6) for size in memory), f"{power:.2f}", f"{number(far / 1e6)} MB"])
    head = ["seconds of", *(f"{size:,} cells" for size in sizes), "power", f"{FAR:,} cells"]
    return f"# {results['device']}, {results['seeds']} seeds per cell, torch {results['torch']}\n\n" + tabulate(
        rows, head, tablefmt="github", disable_numparse=True
    )


def extrapolate(sizes: list[int], amounts: list[float]) -> tuple[float, float]:
    """Fit amount ~ size^p through the last two sizes; return p and the amount at 10,000 cells.

    The amount is that of the power law, or of the line through the two sizes if that is more: a constant part makes an amount
    grow slower than its size only at small sizes.
    """
    (a, b), (x, y) = sizes[-2:], amounts[-2:]
    power = math.log(y / x) / math.log(b / a)
    return power, max(y * (FAR / b) ** power, y + (y - x) / (b - a) * (FAR - b))


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{number(seconds)} s"
    return f"{number(seconds / 60)} min" if seconds < 7200 else f"{number(seconds / 3600)} h"


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.cells")
