"""The process, and those beside it: how many, and that none outlives it. Without torch, which not every stage has to import."""

import contextlib
import ctypes
import multiprocessing
import os
import threading
from multiprocessing import connection

TRIM, MAP = -1, -3
"""What glibc's mallopt calls M_TRIM_THRESHOLD and M_MMAP_THRESHOLD."""
LARGEST = 1 << 30


def available() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def keep_memory() -> None:
    """Has the process keep the memory that it frees, where it can be asked to: by glibc.

    A training step takes and frees the same large tensors again and again. Given back to the system in between, they are pages
    to be found and zeroed anew, 2,500 a step of the smallest models: up to a sixth of its time.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # other C libraries; TypeError: there is none to ask on Windows
        c = ctypes.CDLL(None)
        c.mallopt(TRIM, LARGEST)
        c.mallopt(MAP, LARGEST)


def end_with_parent() -> None:
    """Has this process end when the one that started it has ended, even where that was killed."""
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)
