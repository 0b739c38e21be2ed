"""Checkpoints of runs: checkpoints/<task>/<variant>/<learning rate>_<seed>.safetensors.

Checkpoints are not stage outputs, because DVC removes outputs before it runs a stage. A finished run keeps its last checkpoint,
without the state of the optimizer. If its cell is trained again, with another seed or learning rate, only the missing runs are
trained. Evaluating a task removes the checkpoints of runs that the study no longer has.

Each checkpoint holds a key of everything that its run depends on. It is ignored if the key differs or the file is damaged.
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
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cat.training.distributed import SINGLE_PROCESS, ProcessGroup
from cat.training.fit import State, ValidationRecord
from pipeline.config.study import CellTraining
from pipeline.runtime import workers
from pipeline.storage.files import atomic_write
from pipeline.storage.paths import CHECKPOINTS

INTERVAL_SECONDS = 60.0
"""Time between two checkpoints of a run: at most this much is lost if the process is killed."""
LOCK_TIMEOUT = 5.0
"""Seconds to wait for a killed process to end and release its lock."""


class SavedRun(NamedTuple):
    """Content of a checkpoint."""

    state: State
    seconds: float
    """Training time so far, over all sessions; for runs trained together, the share of this run."""


class Checkpoint(NamedTuple):
    """File and key of a run's checkpoint.

    If `key` is None, the dependencies of the run are unknown and nothing is saved.
    """

    path: Path
    key: str | None

    def read(self) -> SavedRun | None:
        """Read the checkpoint, or None if it is missing, damaged or has another key."""
        try:
            with safe_open(self.path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a mapping
        except (OSError, SafetensorError):
            return None
        text = metadata.get("state", "")
        if metadata.get("digest") != _digest(self.key, text, tensors):
            return None
        fields: dict[str, Any] = json.loads(text)
        moments, recent, seconds = tensors.pop("moments"), tensors.pop("recent"), fields.pop("seconds")
        weights = {name.removeprefix("weights."): tensor for name, tensor in tensors.items()}
        history = [ValidationRecord(**record) for record in fields.pop("history")]
        return SavedRun(State(**fields, history=history, weights=weights, moments=moments, recent=recent), seconds)

    def write(self, state: State, seconds: float) -> None:
        """Replace the checkpoint atomically."""
        if self.key is None:
            return
        tensors = {f"weights.{name}": tensor for name, tensor in state.weights.items()}
        tensors |= {"moments": torch.empty(2, 0) if state.stop else state.moments, "recent": state.recent}
        history = [asdict(record) for record in state.history]
        fields = {"step": state.step, "micro_batch": state.micro_batch, "stop": state.stop}
        text = json.dumps({**fields, "history": history, "seconds": seconds})
        metadata = {"state": text, "digest": _digest(self.key, text, tensors)}
        with atomic_write(self.path) as path:
            path.write_bytes(safetensors.torch.save(tensors, metadata))

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Lock the run. Raises ValueError if another process is training it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with _lock(self.path, LOCK_TIMEOUT):
                yield
        except Timeout:
            raise ValueError(f"{self.path}: another process is training this run; wait for it or stop it") from None


def checkpoint_path(task: str, variant: str, learning_rate: float, seed: int) -> Path:
    """Return the file of a run's checkpoint."""
    return CHECKPOINTS / task / variant / f"{learning_rate}_{seed}.safetensors"


def prune(task: str, trained: Mapping[str, CellTraining]) -> None:
    """Remove the checkpoints of a task but those of its `trained` variants, and of runs in training.

    Lock files stay: if one were removed, two processes could hold it at once.
    """
    kept = {
        checkpoint_path(task, variant, rate, seed)
        for variant, training in trained.items()
        for rate in training.learning_rates
        for seed in training.seeds
    }
    for path in set((CHECKPOINTS / task).glob("*/*.safetensors")) - kept:
        with suppress(Timeout), _lock(path, 0):
            path.unlink(missing_ok=True)


def _lock(path: Path, timeout: float) -> FileLock:
    return FileLock(path.with_suffix(".lock"), timeout=timeout)


def _digest(key: str | None, text: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(f"{key} {text}".encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tuple(tensors[name].shape)}".encode() + tensors[name].numpy().tobytes())
    return digest.hexdigest()


class CheckpointWriter:
    """Callback after every training step that saves the runs every INTERVAL_SECONDS.

    It also saves when runs end and when the process must stop; in the latter case it raises Stopped. In a process group only
    rank 0 saves, and all processes stop if one of them must.
    """

    def __init__(
        self, checkpoints: Sequence[Checkpoint], resumed: Sequence[SavedRun | None], group: ProcessGroup = SINGLE_PROCESS
    ):
        self.checkpoints, self.group = checkpoints, group
        self.previous_seconds = [saved.seconds if saved else 0.0 for saved in resumed]
        self.started = self.last_saved = time.monotonic()

    def __call__(self, states: Callable[[], dict[int, State]], ended: bool) -> None:
        stopping = self.group.all_reduce_max(int(workers.stopping()))
        if self.group.rank == 0 and (ended or stopping or time.monotonic() - self.last_saved >= INTERVAL_SECONDS):
            for index, state in states().items():
                self.checkpoints[index].write(state, self.seconds(index))
            self.last_saved = time.monotonic()
        if stopping:
            self.group.all_reduce_max(0)  # wait for rank 0 to save: torchrun kills it once another process ends
            raise workers.Stopped

    def seconds(self, index: int) -> float:
        """Return the training time so far of the run with this index."""
        return self.previous_seconds[index] + (time.monotonic() - self.started) / len(self.checkpoints)
