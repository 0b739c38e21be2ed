"""Record a function on a GPU as a CUDA graph and replay it: kernels of a small model run faster than they launch."""

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

WARMUP_CALLS = 1
"""Calls before the recording. Libraries initialise themselves in them, which cannot be recorded."""


class GraphedFunction:
    """A function of tensors on a GPU that runs as a CUDA graph after its first call, with the same output to the bit.

    The next call overwrites the output. The function must copy nothing back from the GPU. Every other tensor that it uses must
    keep the address that it had at the recording; call `reset` if one moved. If recording fails or runs out of memory, the
    function is called directly from then on, with a warning.
    """

    def __init__(self, function: Callable[..., Any]):
        self.function = function
        self.recordable = True
        self.reset()

    def reset(self) -> None:
        """Drop the recording and free its memory. Later calls record again."""
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs, self.output = list[Tensor](), None

    def __call__(self, *inputs: Tensor) -> Any:
        self.calls += 1
        if self.graph is None and self.recordable and self.calls > WARMUP_CALLS:
            self._record(inputs)
        if self.graph is None:
            return self.function(*inputs)
        for recorded, new in zip(self.inputs, inputs, strict=True):
            recorded.copy_(new)
        self.graph.replay()
        return self.output

    def _record(self, inputs: tuple[Tensor, ...]) -> None:
        graph, copies = torch.cuda.CUDAGraph(), [x.clone() for x in inputs]
        try:
            with _no_garbage_collection(), torch.cuda.graph(graph, capture_error_mode="thread_local"):
                output = self.function(*copies)
        except RuntimeError as error:  # includes torch.OutOfMemoryError
            self.recordable = False
            torch.cuda.synchronize()
            warnings.warn(f"CUDA graph not recorded, steps will be slower: {error}", stacklevel=2)
            return
        self.graph, self.inputs, self.output = graph, copies, output


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Collect garbage first, then disable it: freeing another graph invalidates a recording in progress."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
