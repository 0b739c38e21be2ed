"""Data-parallel training of one model: each process takes a slice of every batch, and gradients are summed.

The loss is the mean over the answers of the whole batch, so the gradient is a sum over examples. The sum of the processes'
gradients therefore equals the gradient of one process, up to rounding. The weights are equal to the bit on all processes.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
from jaxtyping import Shaped
from torch import Tensor

TIMEOUT = 600
"""Seconds that a process waits for the others before it fails."""
Value = TypeVar("Value")


class ProcessGroup(ABC):
    """The processes that train one model; this one is `rank` of `size`. All must call the methods in the same order."""

    def __init__(self, rank: int, size: int):
        self.rank, self.size = rank, size

    def local_slice(self, count: int) -> slice:
        """Return this process's slice of `count` examples. The sizes of the slices differ by at most one."""
        return slice(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    @abstractmethod
    def all_reduce_sum(self, tensor: Shaped[Tensor, "*S"]) -> Shaped[Tensor, "*S"]:
        """Return the sum over processes, equal to the bit on each. May overwrite `tensor`."""

    @abstractmethod
    def all_reduce_max(self, number: int) -> int:
        """Return the maximum over processes."""

    @abstractmethod
    def broadcast(self, function: Callable[[], Value]) -> Value:
        """Call `function` in process 0 only and return its result in all."""


class SingleProcess(ProcessGroup):
    """A process on its own."""

    def __init__(self) -> None:
        super().__init__(0, 1)

    def all_reduce_sum(self, tensor: Shaped[Tensor, "*S"]) -> Shaped[Tensor, "*S"]:
        return tensor

    def all_reduce_max(self, number: int) -> int:
        return number

    def broadcast(self, function: Callable[[], Value]) -> Value:
        return function()


SINGLE_PROCESS = SingleProcess()


class TorchProcessGroup(ProcessGroup):
    """The processes of torch.distributed. Numbers and objects go through the CPU, so that nothing waits for a GPU."""

    def __init__(self) -> None:
        super().__init__(torch.distributed.get_rank(), torch.distributed.get_world_size())

    def all_reduce_sum(self, tensor: Shaped[Tensor, "*S"]) -> Shaped[Tensor, "*S"]:
        torch.distributed.all_reduce(tensor)
        return tensor

    def all_reduce_max(self, number: int) -> int:
        box = torch.tensor(number)
        torch.distributed.all_reduce(box, torch.distributed.ReduceOp.MAX)
        return int(box)

    def broadcast(self, function: Callable[[], Value]) -> Value:
        box = [function() if self.rank == 0 else None]
        torch.distributed.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]  # type: ignore[return-value]  # the value of process 0


def local_rank() -> int | None:
    """Return the rank of this process on its machine as set by torchrun; None if it runs alone."""
    launched = torch.distributed.is_torchelastic_launched() and int(os.environ["WORLD_SIZE"]) > 1
    return int(os.environ["LOCAL_RANK"]) if launched else None


@contextmanager
def process_group(device: torch.device) -> Iterator[ProcessGroup]:
    """Join the processes that torchrun started, which all compute on the same kind of device."""
    if local_rank() is None:
        yield SINGLE_PROCESS
        return
    backend = "gloo"
    if device.type == "cuda":
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    torch.distributed.init_process_group(backend, timeout=timedelta(seconds=TIMEOUT))
    try:
        yield TorchProcessGroup()
    finally:
        torch.distributed.destroy_process_group()
