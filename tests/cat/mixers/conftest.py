"""Fixtures of the tests of mixers."""

import pytest


@pytest.fixture(params=["loops", "pytorch"])
def backend(request, monkeypatch):
    """Compute recurrences in compiled loops, or in PyTorch operations as on a GPU."""
    if request.param == "pytorch":
        monkeypatch.setattr("cat.ops.scan.recurrence._use_loops", lambda inputs: False)
    return request.param
