"""Which commit the code is at."""

from __future__ import annotations

import os
import subprocess

OUTPUTS = ("dvc.lock", "params.schema.json", "reports", "results", "verdicts", "README.md")
"""What the study itself writes of what git has: its change is none of the code."""


def provenance() -> dict[str, str | bool | None]:
    """`commit` of the checkout and whether it is `dirty`, None outside git; `experiment` under `dvc exp run`."""
    commit = _git("rev-parse", "HEAD")
    others = [f":(top,exclude){path}" for path in OUTPUTS]
    return {
        "commit": commit,
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no", "--", ":/", *others)) if commit else None,
        "experiment": os.environ.get("DVC_EXP_NAME"),
    }


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
