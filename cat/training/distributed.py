"""One model on several processes: each takes its share of the rows of every batch, and what they find out is added up.

With the mean loss over the answers of the whole batch, each gradient is a sum over rows; so the sum of the processes' gradients
is that of one process, up to rounding, and the weights stay the same bits on all.
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

PATIENCE = 600
"""Seconds after which a process that waits for the others ends with an error."""
Value = TypeVar("Value")


class ProcessGroup(ABC):
    """The processes that train one model, of which this is number `rank` of `size`. All call its methods in one order."""

    def __init__(self, rank: int, size: int):
        self.rank, self.size = rank, size

    def local_slice(self, count: int) -> slice:
        """Which of `count` rows are this process's: as many as any other's, or one more or less."""
        return slice(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    @abstractmethod
    def all_reduce_sum(self, tensor: Shaped[Tensor, "*S"]) -> Shaped[Tensor, "*S"]:
        """The sum of the processes' tensors, the same bits on each; may take the place of `tensor`."""

    @abstractmethod
    def all_reduce_max(self, number: int) -> int:
        """The largest of the processes' numbers."""

    @abstractmethod
    def broadcast(self, function: Callable[[], Value]) -> Value:
        """What `function` returns in process 0, the only one that calls it."""


class SingleProcess(ProcessGroup):
    """A process with no others."""

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
    """Those of torch.distributed. Numbers and objects go by way of the CPU, so that nothing waits for a GPU."""

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
        return box[0]  # type: ignore[return-value]  # that of process 0


def local_rank() -> int | None:
    """The number among the processes of this machine that torchrun has given this one; None where it has started no others."""
    several = torch.distributed.is_torchelastic_launched() and int(os.environ["WORLD_SIZE"]) > 1
    return int(os.environ["LOCAL_RANK"]) if several else None


@contextmanager
def process_group(device: torch.device) -> Iterator[ProcessGroup]:
    """The processes that torchrun has started beside this one, all of which compute on devices of this kind."""
    if local_rank() is None:
        yield SINGLE_PROCESS
        return
    backend = "gloo"
    if device.type == "cuda":
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    torch.distributed.init_process_group(backend, timeout=timedelta(seconds=PATIENCE))
    try:
        yield TorchProcessGroup()
    finally:
        torch.distributed.destroy_process_group()
