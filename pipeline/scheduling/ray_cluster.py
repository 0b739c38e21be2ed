"""Cells on the machines of a Ray cluster: what pipeline/runtime/workers.py does with processes, done with tasks of Ray.

    code      cat/ and pipeline/ as they are here, sent when the cluster is joined; Python's packages must be there
    data      a task's training and validation split, sent to a machine once; a job finds them in a folder of its own
    outcome   comes back as an object, to be written here as if the job had been done here

A job whose process or machine is lost is begun again; one that raises is not, since it would raise again. This is the only
module that knows Ray.
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
from pipeline.runtime.determinism import MARK, PINS
from pipeline.runtime.workers import Failure, Report
from pipeline.storage.paths import DATA

RETRIES = 3
"""Times that a job is begun again whose process or machine is lost."""
PATIENCE = 120
"""Seconds after which the study ends where no machine is left for its jobs."""
ANSWER = 5
"""Seconds in which a cluster must answer, and jobs must end that are cancelled."""
QUIET = 1
"""Seconds between two reports of a job, and between two looks at reports and machines: no step is slowed by them."""
ROOT = Path(__file__).parents[2]


@contextlib.contextmanager
def join(address: str, study: Study, jobs: int | None = None) -> Iterator[Cluster]:
    """The cluster at `address`: host:port, `auto` for that of this machine, `local` for one that ends with the block.

    `jobs` is how many run at a time, by default as many as there is room for. Raises ParamsError where params.yaml names a
    device that Ray is not asked for; ValueError where Ray is missing, the cluster cannot be reached, or no machine is enough.
    """
    _check_device(study)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_task_oom_retries", str(RETRIES))  # else what needs too much memory is begun again for ever
    try:
        import ray
    except ImportError:
        raise ValueError("Ray is not installed: pip install 'cat-study[ray]'") from None
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS", "auto")
    if address not in ("auto", "local"):
        _check_address(address)
    with tempfile.TemporaryDirectory() as code:
        # The folder as a whole would bring the data, and all that DVC keeps.
        for package in ("cat", "pipeline"):
            shutil.copytree(ROOT / package, Path(code, package), ignore=shutil.ignore_patterns("__pycache__"))
        own: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
        try:
            pinned = {name: os.environ[name] for name in (*PINS, MARK)} if MARK in os.environ else {}
            ray.init(
                address,
                runtime_env={"working_dir": code, "env_vars": pinned},
                log_to_driver=False,
                logging_level=logging.ERROR,
                **own,
            )
        except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            raise ValueError(f"no Ray cluster at {address}: {_line(error)}") from None
        try:
            yield Cluster(study, jobs)
        finally:
            ray.shutdown()


def _check_device(study: Study) -> None:
    if study.device.startswith("cuda:"):
        raise ParamsError([f"params.yaml: device = {study.device}: Ray chooses among GPUs; use auto or cuda"])
    for task in study.tasks:
        asked = study.resources.on(task)
        if study.device != "auto" and (study.device == "cuda") != (asked.gpus > 0):
            raise ParamsError([f"params.yaml: device = {study.device}: resources ask for {asked} on task {task!r}; use auto"])


def _check_address(address: str) -> None:
    """Raises ValueError where nothing answers: Ray itself tries for minutes."""
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal():
        raise ValueError(f"--ray {address}: is not host:port or auto or local")
    try:
        socket.create_connection((host, int(port)), timeout=ANSWER).close()
    except (OSError, OverflowError) as error:
        raise ValueError(f"no Ray cluster at {address}: {error}") from None


class Cluster:
    """A Ray cluster that this process has joined. Raises ValueError where no machine of it is enough for a job."""

    def __init__(self, study: Study, jobs: int | None):
        self.resources = {task: study.resources.on(task) for task in study.tasks}
        for task, asked in self.resources.items():
            if not _room(asked):
                raise ValueError(f"no machine of the Ray cluster has {asked} for a job on task {task!r}")
        room = max(map(_room, self.resources.values()))
        self.size = min(jobs or room, room)
        """Jobs at a time."""
        self.limit = jobs or math.inf

    def device(self, task: str) -> torch.device:
        """That of a job on `task`, which sees no GPU but its own."""
        return torch.device("cuda" if self.resources[task].gpus else "cpu")

    def work(
        self,
        function: Callable[[Any, torch.device, Report], Any],
        jobs: Sequence[Any],
        *,
        tasks: Sequence[str],
        report: Callable[[int, Any], None],
    ) -> Iterator[tuple[int, Any]]:
        """Index and outcome of each job as it ends, a Failure where it has none; `tasks` names the task of each.

        A job reports (steps done since it last did, what it saw). What is in work is cancelled when the iterator is closed.
        Raises ValueError where no machine is left for a job.
        """
        sent = _Sent(self, function, jobs, tasks)
        told = [0] * len(jobs)

        def tell(index: int, steps: int, seen: Any) -> None:
            # Fewer steps than before, where the job was begun again.
            report(index, (steps - told[index], seen))
            told[index] = steps

        try:
            while sent.left:
                for index, seen in sent.look().items():
                    tell(index, *seen)
                sent.fill()
                for index, message, outcome in sent.ended():
                    if message is not None:
                        tell(index, *message)
                    yield index, outcome
        finally:
            sent.cancel()


class _Call(NamedTuple):
    """What is sent of a job besides its data."""

    function: Callable[[Any, torch.device, Report], Any]
    job: Any
    task: str
    device: torch.device
    torch: str
    """The version from here: results depend on it."""


class _Sent:
    """The jobs that wait here, and those that Ray has."""

    def __init__(self, cluster: Cluster, function: Callable[..., Any], jobs: Sequence[Any], tasks: Sequence[str]):
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self.calls = [
            _Call(function, job, task, cluster.device(task), torch.__version__) for job, task in zip(jobs, tasks, strict=True)
        ]
        self.asked = [cluster.resources[task] for task in tasks]
        files = {task: ray.put(_files(task)) for task in dict.fromkeys(tasks)}
        self.data = [files[task] for task in tasks]
        self.limit = cluster.limit
        self.waiting: dict[Resources, deque[int]] = {}
        for index, asked in enumerate(self.asked):
            self.waiting.setdefault(asked, deque()).append(index)
        self.working: dict[Any, int] = {}
        self.looked = -math.inf
        self.room = dict.fromkeys(self.waiting, 0)
        self.found = dict.fromkeys(self.waiting, time.monotonic())
        """When there last was a machine for such jobs."""
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.box: Any = ray.remote(_Box).options(num_cpus=0, scheduling_strategy=here).remote()
        self.begin = ray.remote(max_retries=RETRIES)(_job)

    @property
    def left(self) -> bool:
        return bool(self.working) or any(self.waiting.values())

    def look(self) -> dict[int, tuple[int, Any]]:
        """What jobs in work reported last, and for itself what machines there are; nothing if it looked a moment ago."""
        import ray

        now = time.monotonic()
        if now - self.looked < QUIET:
            return {}
        self.looked = now
        working = set(self.working.values())
        for asked in {self.asked[index] for index in working} | {asked for asked, queue in self.waiting.items() if queue}:
            self.room[asked] = _room(asked)
            if self.room[asked]:
                self.found[asked] = now
            elif now - self.found[asked] > PATIENCE:
                raise ValueError(f"no machine of the Ray cluster has {asked} any more")
        return {index: message for index, message in ray.get(self.box.take.remote()).items() if index in working}

    def fill(self) -> None:
        """Sends what there is room for and as much again, to wait there: all of it would make every look at it long."""
        sent = Counter(self.asked[index] for index in self.working.values())
        for asked, queue in self.waiting.items():
            options = {"num_cpus": asked.cpus, "num_gpus": asked.gpus, "memory": asked.bytes}
            while queue and sent[asked] < 2 * self.room[asked] and len(self.working) < self.limit:
                index = queue.popleft()
                self.working[self.begin.options(**options).remote(self.calls[index], self.data[index], self.box, index)] = index
                sent[asked] += 1

    def ended(self) -> Iterator[tuple[int, tuple[int, Any] | None, Any]]:
        """Index, last report and outcome of the jobs that have ended; waits a moment for the first."""
        import ray

        if not self.working:
            time.sleep(QUIET)
            return
        ray.wait(list(self.working), timeout=QUIET)
        for job in _done(list(self.working), timeout=0):
            message = None
            try:
                message, outcome = ray.get(job)
            except ray.exceptions.RayTaskError as error:  # what cannot be sent, as an error that cannot be pickled
                outcome = Failure(RuntimeError(_line(error.cause)), str(error))
            except ray.exceptions.RayError as error:
                words = f"its process or machine was lost {RETRIES + 1} times: {_line(error)}"
                outcome = Failure(RuntimeError(words), words)
            yield self.working.pop(job), message, outcome

    def cancel(self) -> None:
        import ray

        left, deadline = set(self.working), time.monotonic() + ANSWER
        while left and ray.is_initialized() and time.monotonic() < deadline:
            for job in left:  # Ray may miss one that is just beginning
                ray.cancel(job)
            left -= set(_done(list(left), timeout=QUIET))


def _done(jobs: list[Any], timeout: float) -> list[Any]:
    """Those that have ended, all of them if they end in time."""
    import ray

    return ray.wait(jobs, num_returns=len(jobs), timeout=timeout)[0] if jobs else []


def _room(asked: Resources) -> int:
    """Jobs that the machines have room for, whoever uses them now."""
    import ray

    needed = {"CPU": asked.cpus, "GPU": asked.gpus, "memory": asked.bytes}
    machines = (machine["Resources"] for machine in ray.nodes() if machine["Alive"])
    return sum(min(int(machine.get(name, 0) / n + 1e-6) for name, n in needed.items() if n) for machine in machines)


def _files(task: str) -> dict[str, NDArray[np.uint8]]:
    """What training reads of a task; as arrays they are shared by the jobs of a machine."""
    return {path.name: np.fromfile(path, dtype=np.uint8) for path in (DATA / task).iterdir()}


class _Box:
    """An actor that keeps the last report of every job until it is taken."""

    def __init__(self) -> None:
        self.messages: dict[int, tuple[int, Any]] = {}

    def put(self, index: int, message: tuple[int, Any]) -> None:
        self.messages[index] = message

    def take(self) -> dict[int, tuple[int, Any]]:
        messages, self.messages = self.messages, {}
        return messages


def _job(call: _Call, files: dict[str, NDArray[np.uint8]], box: Any, index: int) -> tuple[tuple[int, Any], Any]:
    """On a machine of the cluster: the last report of a job, and its outcome."""
    steps, seen, told = 0, None, -math.inf

    def report(message: tuple[int, Any]) -> None:
        nonlocal steps, seen, told
        steps, seen = steps + message[0], message[1] or seen
        if (now := time.monotonic()) - told > QUIET:
            told = now
            box.put.remote(index, (steps, seen))

    workers.prepare()
    with tempfile.TemporaryDirectory(prefix="cat-study-") as folder, contextlib.chdir(folder):
        try:
            if _release(torch.__version__) != _release(call.torch):
                raise RuntimeError(f"torch is {torch.__version__} on {socket.gethostname()}, not {call.torch} as here")
            place = DATA / call.task
            place.mkdir(parents=True)
            for name, content in files.items():
                content.tofile(place / name)
            outcome = call.function(call.job, call.device, report)
        except Exception as error:
            outcome = Failure(error, traceback.format_exc())
    return (steps, seen), outcome


def _release(version: str) -> str:
    """Without what the package was built for."""
    return version.partition("+")[0]


def _line(error: BaseException | str) -> str:
    """The first line of what an error says."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
