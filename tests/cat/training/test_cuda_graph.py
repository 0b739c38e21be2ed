"""Recording and replaying with a fake CUDA graph, whose replay overwrites the old output."""

import gc
from contextlib import contextmanager

import pytest
import torch

from cat.training.cuda_graph import WARMUP_CALLS, GraphedFunction


class Doubling:
    """Returns 2 x and records its calls."""

    def __init__(self):
        self.calls, self.collecting, self.inputs, self.output = 0, [], None, None

    def __call__(self, x):
        self.calls += 1
        self.collecting.append(gc.isenabled())
        self.inputs, self.output = x, 2 * x
        return self.output


@pytest.fixture
def doubling(monkeypatch):
    doubling = Doubling()

    class Graph:
        def replay(self):
            self.output.copy_(2 * self.inputs)

    @contextmanager
    def capture(graph, *, capture_error_mode):
        yield
        graph.inputs, graph.output = doubling.inputs, doubling.output

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return doubling


def test_warmup_calls_run_the_function_and_later_calls_replay(doubling):
    graphed = GraphedFunction(doubling)
    outputs = [graphed(torch.full((2,), float(i))).tolist() for i in range(WARMUP_CALLS + 4)]
    assert outputs == [[2.0 * i] * 2 for i in range(WARMUP_CALLS + 4)]
    assert doubling.calls == WARMUP_CALLS + 1  # the last call records


def test_inputs_are_copied_for_the_recording(doubling):
    """The memory of a recorded batch may be reused afterwards."""
    graphed = GraphedFunction(doubling)
    inputs = [torch.full((2,), float(i)) for i in range(WARMUP_CALLS + 2)]
    for x in inputs:
        graphed(x)
    inputs[WARMUP_CALLS].fill_(100.0)
    assert graphed(torch.ones(2)).tolist() == [2.0, 2.0]
    assert inputs[WARMUP_CALLS].tolist() == [100.0, 100.0]


def test_reset_records_again(doubling):
    graphed = GraphedFunction(doubling)
    for size in (2, 3):
        for i in range(WARMUP_CALLS + 3):
            assert graphed(torch.full((size,), float(i))).tolist() == [2.0 * i] * size
        graphed.reset()
    assert doubling.calls == 2 * (WARMUP_CALLS + 1)


def test_garbage_collection_is_off_while_recording(doubling):
    graphed = GraphedFunction(doubling)
    for _ in range(WARMUP_CALLS + 2):
        graphed(torch.ones(2))
    assert doubling.collecting == [True] * WARMUP_CALLS + [False]
    assert gc.isenabled()


@pytest.mark.parametrize("error", [RuntimeError("operation not permitted"), torch.OutOfMemoryError("none left")])
def test_a_failed_recording_warns_once_and_calls_the_function(doubling, monkeypatch, error):
    @contextmanager
    def refuse(graph, *, capture_error_mode):
        yield
        raise error

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    graphed = GraphedFunction(doubling)
    for i in range(WARMUP_CALLS):
        graphed(torch.full((2,), float(i)))
    with pytest.warns(UserWarning, match=f"not recorded.*{error}"):
        assert graphed(torch.ones(2)).tolist() == [2.0, 2.0]
    assert graphed(torch.full((2,), 5.0)).tolist() == [10.0, 10.0]
    assert doubling.calls == WARMUP_CALLS + 3
    assert gc.isenabled()
