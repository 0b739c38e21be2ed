"""What is done over and over on a GPU, recorded and replayed: the kernels of a small model take less time than their launches."""

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

WARM = 1
"""Calls before the recording: libraries make themselves ready in them, which cannot be recorded."""


class GraphedFunction:
    """A function of tensors on a GPU, from its second call on as a CUDA graph, with the same outcome to the bit.

    The next call writes over the outcome. The function must read nothing back from the GPU, and find all else that it uses where
    that was when it was recorded; where it is not, `forget` the recording. What cannot be recorded is called as it is, and so is
    that for which there is no memory then.
    """

    def __init__(self, function: Callable[..., Any]):
        self.function = function
        self.recordable = True
        self.forget()

    def forget(self) -> None:
        """Records anew, and gives the memory of the recording back."""
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs, self.output = list[Tensor](), None

    def __call__(self, *inputs: Tensor) -> Any:
        self.calls += 1
        if self.graph is None and self.recordable and self.calls > WARM:
            self._record(inputs)
        if self.graph is None:
            return self.function(*inputs)
        for mine, new in zip(self.inputs, inputs, strict=True):
            mine.copy_(new)
        self.graph.replay()
        return self.output

    def _record(self, inputs: tuple[Tensor, ...]) -> None:
        graph, copies = torch.cuda.CUDAGraph(), [x.clone() for x in inputs]
        try:
            with _no_garbage_collected(), torch.cuda.graph(graph, capture_error_mode="thread_local"):
                output = self.function(*copies)
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            self.recordable = False
            torch.cuda.synchronize()
            warnings.warn(f"not recorded, and slower for it: {error}", stacklevel=2)
            return
        self.graph, self.inputs, self.output = graph, copies, output


@contextmanager
def _no_garbage_collected() -> Iterator[None]:
    """But before: a graph that is given back while another is recorded spoils the recording."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
