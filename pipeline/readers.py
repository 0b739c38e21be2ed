"""What another stage has written, read back: whole, or refused in one line that names the file and what to run."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pandas as pd


def arrays(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of an .npz file by name. Raises ValueError where it is anything else; nothing is ever unpickled."""
    with _refused(path, "an .npz file of numbers"):
        if not zipfile.is_zipfile(path) and path.exists():
            raise ValueError("no archive")
        with np.load(path, allow_pickle=False) as file:
            return dict(file)


def table(path: Path, columns: Mapping[str, type]) -> pd.DataFrame:
    """A CSV table with these columns, and others perhaps; an empty field of numbers is nan. Raises ValueError otherwise."""
    import pandas as pd

    floats = {name: ["", "nan"] for name, kind in columns.items() if kind is float}
    with _refused(path, "a CSV table"):
        text = path.read_text(encoding="utf-8")
        if not text.endswith("\n"):
            raise ValueError("its last line has no end")
        # By default a variant called `null` or `nan` would be no text but a gap.
        found = pd.read_csv(io.StringIO(text), dtype=dict(columns), keep_default_na=False, na_values=floats)
        if missing := [name for name in columns if name not in found]:
            raise ValueError(f"lacks the column {missing[0]}")
        return found


@contextmanager
def _refused(path: Path, what: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise ValueError(f"{path}: is missing; `dvc repro` makes it") from None
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        reason = " ".join(str(error).split())
        if "pickle" in reason:  # numpy's advice is to trust it
            reason = "Python objects in it are not loaded"
        raise ValueError(
            f"{path}: is not {what}, or damaged ({reason:.120}); remove it and run `dvc checkout` or `dvc repro`"
        ) from None
