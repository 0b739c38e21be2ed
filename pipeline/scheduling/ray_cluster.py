"""Train cells on a Ray cluster: the counterpart of pipeline/runtime/workers.py with Ray tasks instead of processes.

    code      cat/ and pipeline/ as they are here, sent when joining the cluster; Python packages must be installed there
    data      the training and validation split of a task, sent once per machine; each job finds them in its own folder
    result    returned as an object and written here, as after a local run

A job is restarted if its process or machine is lost. A job that raises is not restarted, since it would raise again. This is
the only module that imports Ray.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import shutil
import socket
import tempfile
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.config.errors import ParamsError
from pipeline.config.study import Resources, Study
from pipeline.runtime import workers
from pipeline.runtime.determinism import DETERMINISTIC_ENV, MARK
from pipeline.runtime.processes import short_tmpdir
from pipeline.runtime.workers import Failure, Report
from pipeline.storage.paths import DATA

RETRIES = 3
"""How often a job is restarted after its process or machine is lost."""
MACHINE_TIMEOUT = 120
"""Seconds to wait for a machine when none is left for a job; then the study ends."""
RESPONSE_TIMEOUT = 5
"""Seconds in which a cluster must answer and cancelled jobs must end."""
POLL_SECONDS = 1
"""Seconds between two reports of a job, and between two checks of reports and machines, so that no step is slowed down."""
SOCKET_TMPDIR = 38
"""Longest folder of Ray's sockets, in bytes: the path of a socket has at most 107, and its name in the folder has up to 69."""
ROOT = Path(__file__).parents[2]


@contextlib.contextmanager
def join(address: str, study: Study, jobs: int | None = None) -> Iterator[Cluster]:
    """Join the cluster at `address`: host:port, "auto" for that of this machine, "local" for one that ends with the block.

    `jobs` is the maximum number of jobs at a time, by default the capacity of the cluster. Raises ParamsError if the device of
    params.yaml contradicts `resources`. Raises ValueError if Ray is not installed, the cluster is unreachable, or no machine
    has the resources of a job.
    """
    _check_device(study)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_task_oom_retries", str(RETRIES))  # by default Ray retries jobs that run out of memory forever
    try:
        import ray
    except ImportError:
        raise ValueError("Ray is not installed: pip install 'cat-study[ray]'") from None
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS", "auto")
    if address not in ("auto", "local"):
        _check_address(address)
    with tempfile.TemporaryDirectory() as code:
        # Only the two packages: the whole folder would include the data and DVC's cache.
        for package in ("cat", "pipeline"):
            shutil.copytree(ROOT / package, Path(code, package), ignore=shutil.ignore_patterns("__pycache__"))
        options: dict[str, Any] = {}
        if address == "local":
            with short_tmpdir(SOCKET_TMPDIR) as folder:
                options = {"include_dashboard": False, "_temp_dir": str(Path(os.environ.get("RAY_TMPDIR", folder), "ray"))}
        try:
            names = (*DETERMINISTIC_ENV, MARK) if MARK in os.environ else ()
            environment = {name: os.environ[name] for name in names if name in os.environ}
            ray.init(
                address,
                runtime_env={"working_dir": code, "env_vars": environment},
                log_to_driver=False,
                logging_level=logging.ERROR,
                **options,
            )
        except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            raise ValueError(f"no Ray cluster at {address}: {_first_line(error)}") from None
        try:
            yield Cluster(study, jobs)
        finally:
            ray.shutdown()


def _check_device(study: Study) -> None:
    if study.device.startswith("cuda:"):
        raise ParamsError([f"params.yaml: device = {study.device}: Ray chooses the GPU; use auto or cuda"])
    for task in study.tasks:
        resources = study.resources.on(task)
        if study.device != "auto" and (study.device == "cuda") != (resources.gpus > 0):
            message = f"params.yaml: device = {study.device}: resources of task {task!r} are {resources}; use auto"
            raise ParamsError([message])


def _check_address(address: str) -> None:
    """Raise ValueError if nothing answers at `address`. Ray itself would retry for minutes."""
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal():
        raise ValueError(f"--ray {address}: is not host:port, auto or local")
    try:
        socket.create_connection((host, int(port)), timeout=RESPONSE_TIMEOUT).close()
    except (OSError, OverflowError) as error:
        raise ValueError(f"no Ray cluster at {address}: {error}") from None


class Cluster:
    """A Ray cluster that this process has joined. Raises ValueError if no machine has the resources of a job."""

    def __init__(self, study: Study, jobs: int | None):
        self.resources = {task: study.resources.on(task) for task in study.tasks}
        for task, resources in self.resources.items():
            if not _capacity(resources):
                raise ValueError(f"no machine of the Ray cluster has {resources} for a job on task {task!r}")
        capacity = max(map(_capacity, self.resources.values()))
        self.size = min(jobs or capacity, capacity)
        """Number of jobs at a time."""
        self.limit = jobs or math.inf

    def device(self, task: str) -> torch.device:
        """Return the device of a job on `task`; a job sees only its own GPU."""
        return torch.device("cuda" if self.resources[task].gpus else "cpu")

    def run_jobs(
        self,
        function: Callable[[Any, torch.device, Report], Any],
        jobs: Sequence[Any],
        *,
        tasks: Sequence[str],
        report: Callable[[int, Any], None],
    ) -> Iterator[tuple[int, Any]]:
        """Yield index and outcome of each job as it ends; the outcome of a failed job is a Failure.

        `tasks` has the task of each job. A job reports (steps since its last report, new validation records by run).
        Closing the iterator cancels running jobs. Raises ValueError if no machine is left for a job.
        """
        queue = _JobQueue(self, function, jobs, tasks)
        reported = [0] * len(jobs)

        def report_steps(index: int, steps: int, records: Any) -> None:
            # The difference is negative after a restart of the job.
            report(index, (steps - reported[index], records))
            reported[index] = steps

        try:
            while queue.unfinished:
                for index, message in queue.poll().items():
                    report_steps(index, *message)
                queue.submit()
                for index, last_message, outcome in queue.finished():
                    if last_message is not None:
                        report_steps(index, *last_message)
                    yield index, outcome
        finally:
            queue.cancel()


class _Call(NamedTuple):
    """A job as it is sent to a machine, without its data."""

    function: Callable[[Any, torch.device, Report], Any]
    job: Any
    task: str
    device: torch.device
    torch: str
    """Version of torch on this machine, on which results depend."""


class _JobQueue:
    """Jobs that wait on this machine and jobs that were submitted to Ray."""

    def __init__(self, cluster: Cluster, function: Callable[..., Any], jobs: Sequence[Any], tasks: Sequence[str]):
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self.calls = [
            _Call(function, job, task, cluster.device(task), torch.__version__) for job, task in zip(jobs, tasks, strict=True)
        ]
        self.resources = [cluster.resources[task] for task in tasks]
        files = {task: ray.put(_files(task)) for task in dict.fromkeys(tasks)}
        self.data = [files[task] for task in tasks]
        self.limit = cluster.limit
        self.waiting: dict[Resources, deque[int]] = {}
        for index, resources in enumerate(self.resources):
            self.waiting.setdefault(resources, deque()).append(index)
        self.submitted: dict[Any, int] = {}
        self.last_poll = -math.inf
        self.capacity = dict.fromkeys(self.waiting, 0)
        self.last_available = dict.fromkeys(self.waiting, time.monotonic())
        """When a machine with these resources was last available."""
        this_node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.mailbox: Any = ray.remote(_Mailbox).options(num_cpus=0, scheduling_strategy=this_node).remote()
        self.remote_job = ray.remote(max_retries=RETRIES)(_job)

    @property
    def unfinished(self) -> bool:
        return bool(self.submitted) or any(self.waiting.values())

    def poll(self) -> dict[int, tuple[int, Any]]:
        """Return the last reports of submitted jobs and update the capacity; at most once per POLL_SECONDS."""
        import ray

        now = time.monotonic()
        if now - self.last_poll < POLL_SECONDS:
            return {}
        self.last_poll = now
        indices = set(self.submitted.values())
        needed = {self.resources[index] for index in indices} | {resources for resources, queue in self.waiting.items() if queue}
        for resources in needed:
            self.capacity[resources] = _capacity(resources)
            if self.capacity[resources]:
                self.last_available[resources] = now
            elif now - self.last_available[resources] > MACHINE_TIMEOUT:
                raise ValueError(f"no machine of the Ray cluster has {resources} any more")
        return {index: message for index, message in ray.get(self.mailbox.take.remote()).items() if index in indices}

    def submit(self) -> None:
        """Submit twice as many jobs as the cluster has capacity for; submitting all would make every poll slow."""
        count = Counter(self.resources[index] for index in self.submitted.values())
        for resources, queue in self.waiting.items():
            options = {"num_cpus": resources.cpus, "num_gpus": resources.gpus, "memory": resources.bytes}
            while queue and count[resources] < 2 * self.capacity[resources] and len(self.submitted) < self.limit:
                index = queue.popleft()
                job = self.remote_job.options(**options).remote(self.calls[index], self.data[index], self.mailbox, index)
                self.submitted[job] = index
                count[resources] += 1

    def finished(self) -> Iterator[tuple[int, tuple[int, Any] | None, Any]]:
        """Yield index, last report and outcome of finished jobs; wait up to POLL_SECONDS for the first."""
        import ray

        if not self.submitted:
            time.sleep(POLL_SECONDS)
            return
        ray.wait(list(self.submitted), timeout=POLL_SECONDS)
        for job in _finished(list(self.submitted), timeout=0):
            message = None
            try:
                message, outcome = ray.get(job)
            except ray.exceptions.RayTaskError as error:  # the result cannot be sent, such as an error that cannot be pickled
                outcome = Failure(RuntimeError(_first_line(error.cause)), str(error))
            except ray.exceptions.RayError as error:
                reason = f"the process or machine was lost {RETRIES + 1} times: {_first_line(error)}"
                outcome = Failure(RuntimeError(reason), reason)
            yield self.submitted.pop(job), message, outcome

    def cancel(self) -> None:
        import ray

        running, deadline = set(self.submitted), time.monotonic() + RESPONSE_TIMEOUT
        while running and ray.is_initialized() and time.monotonic() < deadline:
            for job in running:  # repeated, since Ray may miss a job that is just starting
                ray.cancel(job)
            running -= set(_finished(list(running), timeout=POLL_SECONDS))


def _finished(jobs: list[Any], timeout: float) -> list[Any]:
    """Wait until all jobs have finished, at most `timeout` seconds, and return those that have."""
    import ray

    return ray.wait(jobs, num_returns=len(jobs), timeout=timeout)[0] if jobs else []


def _capacity(resources: Resources) -> int:
    """Return how many such jobs the machines can run at a time, whether or not they are in use now."""
    import ray

    needed = {"CPU": resources.cpus, "GPU": resources.gpus, "memory": resources.bytes}
    machines = (machine["Resources"] for machine in ray.nodes() if machine["Alive"])
    return sum(min(int(machine.get(name, 0) / n + 1e-6) for name, n in needed.items() if n) for machine in machines)


def _files(task: str) -> dict[str, NDArray[np.uint8]]:
    """Read the files of a task for training, as arrays because the jobs of a machine share these."""
    return {path.name: np.fromfile(path, dtype=np.uint8) for path in (DATA / task).iterdir()}


class _Mailbox:
    """Actor that stores the last report of each job."""

    def __init__(self) -> None:
        self.messages: dict[int, tuple[int, Any]] = {}

    def put(self, index: int, message: tuple[int, Any]) -> None:
        self.messages[index] = message

    def take(self) -> dict[int, tuple[int, Any]]:
        messages, self.messages = self.messages, {}
        return messages


def _job(call: _Call, files: dict[str, NDArray[np.uint8]], mailbox: Any, index: int) -> tuple[tuple[int, Any], Any]:
    """Run a job on a machine of the cluster and return its last report and its outcome."""
    steps, records, last_report = 0, dict[Any, Any](), -math.inf

    def report(message: tuple[int, Any]) -> None:
        nonlocal steps, last_report
        steps += message[0]
        records.update(message[1])
        if (now := time.monotonic()) - last_report > POLL_SECONDS:
            last_report = now
            mailbox.put.remote(index, (steps, records))

    workers.prepare()
    with tempfile.TemporaryDirectory(prefix="cat-study-") as folder, contextlib.chdir(folder):
        try:
            if _release(torch.__version__) != _release(call.torch):
                raise RuntimeError(
                    f"torch is {torch.__version__} on {socket.gethostname()}, but {call.torch} where the study runs"
                )
            data = DATA / call.task
            data.mkdir(parents=True)
            for name, content in files.items():
                content.tofile(data / name)
            outcome = call.function(call.job, call.device, report)
        except Exception as error:
            outcome = Failure(error, traceback.format_exc())
    return (steps, records), outcome


def _release(version: str) -> str:
    """Return the version without the build, such as +cu118."""
    return version.partition("+")[0]


def _first_line(error: BaseException | str) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
