"""Check shapes and types of all code that computes with tensors while the tests run."""

import pkgutil
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from jaxtyping import install_import_hook

# pydantic checks its own classes, in which beartype cannot read `Self`. Triton and Numba compile the source as it is. In cat.hf,
# transformers replaces the __init__ of configurations.
NOT_CHECKED = re.compile(r"cat\.tasks\.|cat\.hf$|.*\.(config|registry|triton_backend|numba_\w+)$")
LIBRARY = Path(__file__).parent.parent / "cat"
UNIT = Path(__file__).parent / "cat"
"""The tests of the library; the others run stages, commands and processes."""

# Some tests send interrupts. A shell makes its background processes, and all their children, ignore them.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

torch.set_num_threads(1)  # several test processes run at once; more threads than cores would slow them many times

modules = [module.name for module in pkgutil.walk_packages([str(LIBRARY)], "cat.") if not module.ispkg]
install_import_hook([name for name in modules if not NOT_CHECKED.match(name)], "beartype.beartype")


@pytest.fixture(autouse=True, scope="module")
def _clear_cached_splits():
    """Training caches the splits of a task by its name. Another test module's task of that name has other splits."""
    if (train := sys.modules.get("pipeline.stages.train")) is not None:
        train._splits.cache_clear()


@pytest.fixture
def study(finished, tmp_path, monkeypatch):
    """Copy the module's folder `finished`, make the copy the working directory, and load its params.yaml."""
    from pipeline.config.load import load_study

    shutil.copytree(finished, tmp_path / "study")
    monkeypatch.chdir(tmp_path / "study")
    return load_study()


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="also run the tests that take minutes")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if UNIT in item.path.parents:
            item.add_marker(pytest.mark.unit)
    if not config.getoption("--long"):
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="takes minutes; run with --long"))
