"""Git commit of the code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

OUTPUTS = ("dvc.lock", "params.schema.json", "reports", "results", "scores", "verdicts", "README.md")
"""Files in git that the stages write. Changes to them do not make the checkout dirty."""


def provenance() -> dict[str, str | bool | None]:
    """Return `commit`, `dirty` and `experiment` of the checkout.

    Only files in the folder of params.yaml count, since the repository may have other folders. `commit` and `dirty` are None
    if this folder is not in git, or git cannot read the repository. `experiment` is set only under `dvc exp run`.
    """
    # Unlike Path.exists, os.path.exists does not raise in a folder that the user may not enter.
    folders = (Path.cwd(), *Path.cwd().parents)
    project = next((folder for folder in folders if os.path.exists(folder / "params.yaml")), Path.cwd())  # noqa: PTH110
    # `HEAD:./` is the folder in the commit: it fails for a copy of the project inside another repository.
    found = _git(project, "rev-parse", "HEAD", "HEAD:./")
    excluded = [f":(exclude){path}" for path in OUTPUTS]
    status = _git(project, "status", "--porcelain", "--untracked-files=no", "--", ".", *excluded) if found else None
    return {
        "commit": found.split()[0] if found else None,
        "dirty": None if status is None else bool(status),
        "experiment": os.environ.get("DVC_EXP_NAME"),
    }


def _git(folder: Path, *arguments: str) -> str | None:
    """Return what git prints, or None if it fails. If git refuses the repository, print its remedy."""
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, env={**os.environ, "LC_ALL": "C"})
    except OSError:
        return None
    if done.returncode == 0:
        return os.fsdecode(done.stdout).strip()
    remedy = next((line.strip() for line in os.fsdecode(done.stderr).splitlines() if "--add safe.directory" in line), None)
    if remedy:
        print(f"{folder}: belongs to another user, so git does not read its commit. Fix: `{remedy}`", file=sys.stderr)
    return None
