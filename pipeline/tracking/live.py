"""Show runs in MLflow while they train.

A process of its own reads the files of cells in training (pipeline/storage/live.py) and logs their new rows every few seconds. So
a slow or absent server delays no training step; rows wait until it answers. Such a run has the kind `live`. The next
synchronisation logs the final runs from the files of the study and deletes the live ones.

    python -m pipeline.tracking.live     runs until its standard input ends, as it does when its parent ends in any way
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from filelock import FileLock, Timeout

from pipeline.config.load import load_study
from pipeline.config.study import Study
from pipeline.storage.live import LiveReader, Row, is_training, live_paths
from pipeline.storage.paths import CHECKPOINTS
from pipeline.tracking.pages import CONTEXT_TAG, FOLDER_TAG, LIVE, Pages, context_tag
from pipeline.tracking.records import CURVES
from pipeline.tracking.training_runs import end_killed, live_runs

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

INTERVAL = 3.0
"""Seconds between two reports."""
LONGEST_WAIT = 60.0
"""Seconds between two attempts to reach a server that does not answer."""
END_TIMEOUT = 5.0
"""Seconds in which the process must end, whatever the server does."""
LOG = CHECKPOINTS / "live.log"
_METRICS = {**CURVES, "schedule": "train/learning_rate"}
_STATUS = {"trained": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}


class RunName(NamedTuple):
    """A run of a cell."""

    task: str
    variant: str
    learning_rate: float
    seed: int


def start() -> subprocess.Popen[bytes] | None:
    """Start the process; None if it cannot start. Its messages are in LOG."""
    try:
        LOG.parent.mkdir(parents=True, exist_ok=True)
        with LOG.open("w") as log:
            command = [sys.executable, "-m", "pipeline.tracking.live"]
            # In its own session, so that Ctrl-C does not reach it before the last rows are written.
            return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True)
    except OSError:
        return None


def end(process: subprocess.Popen[bytes]) -> None:
    """End the process after its last rows, or after END_TIMEOUT."""
    try:
        process.communicate(timeout=END_TIMEOUT)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def main() -> None:
    """Forward until the standard input ends, unless another process of this folder does so already."""
    if hasattr(os, "nice"):
        os.nice(19)  # training has the cores first
    over = threading.Event()

    def wait_for_end() -> None:
        sys.stdin.read()
        over.set()

    threading.Thread(target=wait_for_end, daemon=True).start()
    with suppress(Timeout), FileLock(LOG.with_suffix(".lock")).acquire(timeout=0):
        forward(load_study(), over.wait)


def forward(study: Study, wait: Callable[[float], bool]) -> None:
    """Log the new rows of all cells in training until `wait`, given seconds, returns whether it is over."""
    from pipeline.tracking.store import explain_error, store_errors
    from pipeline.tracking.sync import connect

    errors = store_errors()
    caught: tuple[type[Exception], ...] = (*errors, ValueError, OSError)
    forwarder: Forwarder | None = None
    pause, over = INTERVAL, False
    while True:
        try:
            if forwarder is None:
                client, pages, _ = connect(study)
                end_killed(client, pages)
                forwarder = Forwarder(study, client, pages)
            forwarder.push()
            if over:
                forwarder.close()
            pause = INTERVAL
        except caught as error:
            print(explain_error(error) if isinstance(error, errors) else error, flush=True)
            pause = min(2 * pause, LONGEST_WAIT)
        if over:
            return
        over = wait(pause)


class Forwarder:
    """Reads the live files and logs their rows to runs of the kind LIVE."""

    def __init__(self, study: Study, client: MlflowClient, pages: Pages):
        self.study, self.client, self.pages = study, client, pages
        self.readers: dict[Path, LiveReader] = {}
        self.rows: dict[RunName, list[Row]] = {}
        """Rows that are not logged yet."""
        self.ended: dict[RunName, str] = {}
        self.run_ids: dict[RunName, str] = {}
        self.system = _SystemMetrics()

    def push(self) -> None:
        """Log the new rows and ends; the next call tries failed ones again."""
        for path in live_paths():
            if path not in self.readers:
                if not is_training(path):
                    continue  # of an earlier call
                self.readers[path] = LiveReader(path)
            self._read(path)
        system = self.system.measure()
        for name, rows in list(self.rows.items()):
            if name.task in self.pages.experiment_ids:
                self._log(name, rows, system)
            del self.rows[name]
        for name, how in list(self.ended.items()):
            if name in self.run_ids:
                self.client.set_terminated(self.run_ids.pop(name), _STATUS[how])
            del self.ended[name]

    def close(self) -> None:
        """End the runs whose training was killed."""
        for run_id in self.run_ids.values():
            self.client.set_terminated(run_id, "KILLED")

    def _read(self, path: Path) -> None:
        task, variant = path.parts[-3:-1]
        for row in self.readers[path].read():
            if "seed" in row:
                self.rows.setdefault(RunName(task, variant, row["learning_rate"], row["seed"]), []).append(row)
            elif "ended" in row:
                names = {name for name in (*self.rows, *self.run_ids) if name[:2] == (task, variant)}
                for name in names:
                    self.ended[name] = row["ended"]

    def _log(self, name: RunName, rows: list[Row], system: dict[str, float]) -> None:
        from mlflow.entities import Metric

        if name not in self.run_ids:
            self.run_ids[name] = self._create(name, rows[0]["time"])
        metrics = [
            Metric(metric, row[column], int(1000 * row["time"]), row["step"])
            for row in rows
            for column, metric in _METRICS.items()
            if row.get(column) is not None and row[column] == row[column]
        ]
        last = rows[-1]
        metrics += [Metric(f"system/{key}", value, int(1000 * last["time"]), last["step"]) for key, value in system.items()]
        for start in range(0, len(metrics), 1000):
            self.client.log_batch(self.run_ids[name], metrics[start : start + 1000])

    def _create(self, name: RunName, started: float) -> str:
        """Create the run in place of that of an earlier training."""
        from pipeline.reporting.labels import variant_label, with_slug
        from pipeline.tracking.store import folder_id

        label = variant_label(self.study, name.variant) if name.variant in self.study.variants else name.variant
        tags = {
            "kind": LIVE,
            CONTEXT_TAG: context_tag(os.environ.get("DVC_EXP_NAME", "")),
            FOLDER_TAG: folder_id(),
            "task": name.task,
            "variant": name.variant,
            "seed": str(name.seed),
            "learning_rate": f"{name.learning_rate:g}",
            "mlflow.source.type": "PROJECT",
            "mlflow.source.name": "python -m pipeline run",
        }
        for run in live_runs(self.client, self.pages):
            if all(run.data.tags.get(key) == tags[key] for key in ("task", "variant", "seed", "learning_rate")):
                self.client.delete_run(run.info.run_id)
        title = f"{with_slug(label, name.variant)} seed {name.seed}, learning rate {name.learning_rate:g}"
        experiment_id = self.pages.experiment_ids[name.task]
        run = self.client.create_run(experiment_id, start_time=int(1000 * started), tags=tags, run_name=title)
        for key in ("task", "variant", "seed", "learning_rate"):
            self.client.log_param(run.info.run_id, key, tags[key])
        return str(run.info.run_id)


class _SystemMetrics:
    """Load of this machine: of the processor with psutil, of GPUs with NVML, if they are installed."""

    def __init__(self) -> None:
        self.monitors: list[Any] = []
        from mlflow.system_metrics.metrics import cpu_monitor, gpu_monitor

        for monitor in (cpu_monitor.CPUMonitor, gpu_monitor.GPUMonitor):
            # Each raises its own errors if its library or driver is missing.
            with suppress(Exception):
                self.monitors.append(monitor())

    def measure(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for monitor in self.monitors:
            with suppress(Exception):
                monitor.clear_metrics()
                monitor.collect_metrics()
                found |= monitor.aggregate_metrics()
        return found


if __name__ == "__main__":
    main()
