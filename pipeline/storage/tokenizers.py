"""Read the tokenizer of a task's data."""

from __future__ import annotations

from cat.tasks.tokenizer import Bytes, Tokenizer, load
from pipeline.storage.files import read_json, readable
from pipeline.storage.paths import DATA


def read_tokenizer(task: str) -> Tokenizer:
    """Read the tokenizer that encoded a task's text. Raises ValueError if the data or the tokenizer are missing."""
    meta_path, path = DATA / task / "meta.json", DATA / task / "tokenizer.json"
    if not meta_path.exists():
        raise ValueError(f"{DATA / task}: is missing. Fix: run `dvc repro generate@{task}`")
    meta = read_json(meta_path)
    with readable(meta_path, "the description of a task's data"):
        if meta["config"].get("tokens", "bytes") == "bytes":
            return Bytes()
    with readable(path, "a tokenizer"):
        return load(path.read_text(encoding="utf-8"))
