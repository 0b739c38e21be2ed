"""Number of cores, memory and lifetime of processes. Does not import torch, which some stages do not need."""

import contextlib
import ctypes
import multiprocessing
import os
import tempfile
import threading
from collections.abc import Iterator
from multiprocessing import connection

TRIM, MAP = -1, -3
"""M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of glibc's mallopt."""
MAX_THRESHOLD = 1 << 30


def available() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def keep_memory() -> None:
    """Keep freed memory in this process instead of returning it to the system; only with glibc.

    A training step allocates and frees the same large tensors again and again. If their memory is returned in between, the
    system must find and zero the pages again: 2,500 per step of the smallest models, up to a sixth of its time.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # other C libraries; TypeError: Windows
        c = ctypes.CDLL(None)
        c.mallopt(TRIM, MAX_THRESHOLD)
        c.mallopt(MAP, MAX_THRESHOLD)


@contextlib.contextmanager
def short_tmpdir(longest: int) -> Iterator[str]:
    """Use a temporary folder with at most `longest` bytes for sockets: /tmp if TMPDIR is longer, as some batch systems set it."""
    previous = tempfile.gettempdir()
    if len(os.fsencode(previous)) > longest and os.access("/tmp", os.W_OK | os.X_OK):
        tempfile.tempdir = "/tmp"
    try:
        yield tempfile.gettempdir()
    finally:
        tempfile.tempdir = previous


def end_with_parent() -> None:
    """End this process when its parent process ends, even if the parent is killed."""
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)
