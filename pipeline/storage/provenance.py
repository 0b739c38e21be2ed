"""Git commit of the code."""

from __future__ import annotations

import os
import subprocess

OUTPUTS = ("dvc.lock", "params.schema.json", "reports", "results", "verdicts", "README.md")
"""Files in git that the stages write. Changes to them do not make the checkout dirty."""


def provenance() -> dict[str, str | bool | None]:
    """Return `commit`, `dirty` and `experiment` of the checkout.

    `commit` and `dirty` are None outside git. `experiment` is set only under `dvc exp run`.
    """
    commit = _git("rev-parse", "HEAD")
    excluded = [f":(top,exclude){path}" for path in OUTPUTS]
    return {
        "commit": commit,
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no", "--", ":/", *excluded)) if commit else None,
        "experiment": os.environ.get("DVC_EXP_NAME"),
    }


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
