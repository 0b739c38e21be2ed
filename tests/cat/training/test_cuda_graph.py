"""Recording and replaying, by what stands in for a CUDA graph: its replay calls the function again, over the old outcome."""

import gc
from contextlib import contextmanager

import pytest
import torch

from cat.training.cuda_graph import WARM, GraphedFunction


class Doubling:
    """2 x, and what became of its calls."""

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
    def record(graph, *, capture_error_mode):
        yield
        graph.inputs, graph.output = doubling.inputs, doubling.output

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return doubling


def test_it_is_called_until_it_is_warm_and_replayed_from_then_on(doubling):
    replay = GraphedFunction(doubling)
    outcomes = [replay(torch.full((2,), float(i))).tolist() for i in range(WARM + 4)]
    assert outcomes == [[2.0 * i] * 2 for i in range(WARM + 4)]
    assert doubling.calls == WARM + 1  # the last of them to record it


def test_what_is_given_later_is_not_what_was_recorded(doubling):
    """The recording reads copies of its own: a batch that is dropped may be written over."""
    replay = GraphedFunction(doubling)
    inputs = [torch.full((2,), float(i)) for i in range(WARM + 2)]
    for x in inputs:
        replay(x)
    inputs[WARM].fill_(100.0)
    assert replay(torch.ones(2)).tolist() == [2.0, 2.0]
    assert inputs[WARM].tolist() == [100.0, 100.0]


def test_what_is_forgotten_is_recorded_anew(doubling):
    replay = GraphedFunction(doubling)
    for size in (2, 3):
        for i in range(WARM + 3):
            assert replay(torch.full((size,), float(i))).tolist() == [2.0 * i] * size
        replay.forget()
    assert doubling.calls == 2 * (WARM + 1)


def test_garbage_is_not_collected_while_it_is_recorded(doubling):
    replay = GraphedFunction(doubling)
    for _ in range(WARM + 2):
        replay(torch.ones(2))
    assert doubling.collecting == [True] * WARM + [False]
    assert gc.isenabled()


@pytest.mark.parametrize("error", [RuntimeError("operation not permitted"), torch.OutOfMemoryError("none left")])
def test_what_cannot_be_recorded_is_called_as_it_is_and_said_once(doubling, monkeypatch, error):
    @contextmanager
    def refuse(graph, *, capture_error_mode):
        yield
        raise error

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    replay = GraphedFunction(doubling)
    for i in range(WARM):
        replay(torch.full((2,), float(i)))
    with pytest.warns(UserWarning, match=f"not recorded, and slower for it: {error}"):
        assert replay(torch.ones(2)).tolist() == [2.0, 2.0]
    assert replay(torch.full((2,), 5.0)).tolist() == [10.0, 10.0]
    assert doubling.calls == WARM + 3
    assert gc.isenabled()
