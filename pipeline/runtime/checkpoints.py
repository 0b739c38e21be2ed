"""checkpoints/<task>/<variant>/<learning rate>_<seed>.safetensors: how far the runs of a cell that is not evaluated have come.

They are outputs of no stage, since DVC removes those before it runs one. A run that has ended leaves its last, so that of a cell
that is trained again only what is missing is trained; the evaluation of a task, for which DVC has recorded its cells, takes
its checkpoints away. Each bears the key of all that its run depends on, and is passed over where that or a bit of it has changed.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cat.training.distributed import SINGLE_PROCESS, ProcessGroup
from cat.training.fit import State, ValidationRecord
from pipeline.runtime import workers
from pipeline.storage.files import atomic_write
from pipeline.storage.paths import CHECKPOINTS

EVERY = 60.0
"""Seconds of a run that are lost at most."""
PATIENCE = 5.0
"""Seconds that a process which has been killed may take to end."""


class Kept(NamedTuple):
    """What a checkpoint holds."""

    state: State
    seconds: float
    """Spent on the run until then, whenever that was; of runs that are trained at once, this one's share."""


class Checkpoint(NamedTuple):
    """Where that of a run is; None for `key` where nobody can tell what the run depends on, and nothing is kept."""

    path: Path
    key: str | None

    def read(self) -> Kept | None:
        """What to go on from, if there is anything."""
        try:
            with safe_open(self.path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a mapping
        except (OSError, SafetensorError):
            return None
        text = metadata.get("state", "")
        if metadata.get("digest") != _digest(self.key, text, tensors):
            return None
        about: dict[str, Any] = json.loads(text)
        moments, recent, seconds = tensors.pop("moments"), tensors.pop("recent"), about.pop("seconds")
        weights = {name.removeprefix("weights."): tensor for name, tensor in tensors.items()}
        history = [ValidationRecord(**row) for row in about.pop("history")]
        return Kept(State(**about, history=history, weights=weights, moments=moments, recent=recent), seconds)

    def write(self, state: State, seconds: float) -> None:
        """Takes the place of the one before in one step."""
        if self.key is None:
            return
        tensors = {f"weights.{name}": tensor for name, tensor in state.weights.items()}
        tensors |= {"moments": state.moments, "recent": state.recent}
        history = [asdict(row) for row in state.history]
        about = {"step": state.step, "micro_batch": state.micro_batch, "stop": state.stop}
        text = json.dumps({**about, "history": history, "seconds": seconds})
        metadata = {"state": text, "digest": _digest(self.key, text, tensors)}
        with atomic_write(self.path) as path:
            path.write_bytes(safetensors.torch.save(tensors, metadata))

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Raises ValueError where another process trains the run."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with _lock(self.path, PATIENCE):
                yield
        except Timeout:
            raise ValueError(f"{self.path}: another process trains this run; wait for it, or end it") from None


def clear(task: str) -> None:
    """Removes those of a task, but of runs that are being trained. Locks stay: one that is removed can be had twice."""
    for path in (CHECKPOINTS / task).glob("*/*.safetensors"):
        with suppress(Timeout), _lock(path, 0):
            path.unlink(missing_ok=True)


def _lock(path: Path, patience: float) -> FileLock:
    return FileLock(path.with_suffix(".lock"), timeout=patience)


def _digest(key: str | None, text: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(f"{key} {text}".encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tuple(tensors[name].shape)}".encode() + tensors[name].numpy().tobytes())
    return digest.hexdigest()


class Keeper:
    """Called after every step of the runs that these are the checkpoints of: keeps their states every now and then.

    And those of runs that have ended, and all of them where the process is asked to stop: then it raises Stopped. Of a group of
    processes the first keeps them, and all stop where one of them is asked to.
    """

    def __init__(self, checkpoints: Sequence[Checkpoint], kept: Sequence[Kept | None], group: ProcessGroup = SINGLE_PROCESS):
        self.checkpoints, self.group = checkpoints, group
        self.before = [one.seconds if one else 0.0 for one in kept]
        self.began = self.kept = time.monotonic()

    def __call__(self, states: Callable[[], dict[int, State]], ended: bool) -> None:
        stopping = self.group.all_reduce_max(int(workers.stopping()))
        if self.group.rank == 0 and (ended or stopping or time.monotonic() - self.kept >= EVERY):
            for place, state in states().items():
                self.checkpoints[place].write(state, self.seconds(place))
            self.kept = time.monotonic()
        if stopping:
            self.group.all_reduce_max(0)  # waits for the first, which torchrun would end with the others
            raise workers.Stopped

    def seconds(self, place: int) -> float:
        """Spent so far on the run of that place."""
        return self.before[place] + (time.monotonic() - self.began) / len(self.checkpoints)
