"""Generate the data of a task: data/<task>/ for training and validation, heldout/<task>/ for the test splits.

data/<task>/ holds train.npz and valid.npz, each with `inputs` and `targets`. For text, tokens.npy holds the training tokens,
and train.npz the `starts` of the windows and their `length`. tokenizer.json exists if a tokenizer was learned.

heldout/<task>/ holds one .npz file per test split. For text it also holds

    extents.npz    bytes, words and unknown bytes that the targets of each region stand for
    recalled.npz   which targets also occur earlier in their context (only if the task sets `ngram`)

Each folder has a meta.json with its description. data/<task>/ does not depend on the number and lengths of the test sequences:
a change of these trains nothing again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from cat.seeding import generator
from cat.tasks.base import Task, Windows
from pipeline.storage.files import atomic_write, sha256, write_json
from pipeline.storage.paths import DATA, HELDOUT
from pipeline.storage.task_data import training_names

TEST_KEYS = {"test_examples", "min_test_examples", "multiples", "test_source", "test_depth"}
"""The keys of a task that only its test splits depend on."""


def generate(name: str, task: Task, data_seed: int) -> None:
    """Write every split of `task`, or none. Raises ValueError if its source has no text."""
    header = {"task": name, "kind": task.kind, "data_seed": data_seed}
    with atomic_write(DATA / name) as data:
        data.mkdir()
        _write_training(data, header, task)
        with atomic_write(HELDOUT / name) as heldout:
            heldout.mkdir()
            _write_test(heldout, header, task)


def _write_training(folder: Path, header: dict[str, Any], task: Task) -> None:
    name, data_seed = header["task"], header["data_seed"]
    splits = training_names(task.training_lengths)
    training = {length: task.training(length, generator(data_seed, name, split)) for length, split in splits.items()}
    for length, split in splits.items():
        arrays = training[length]._asdict()
        arrays.pop("tokens", None)
        np.savez(folder / f"{split}.npz", **arrays)
    longest = training[task.length]
    meta = {
        **header,
        "vocabulary": task.vocabulary,
        "length": task.length,
        "training_lengths": list(task.training_lengths),
        "goal": task.goal,
        "autoregressive": task.autoregressive,
        "splits": {
            **{
                split: {"examples": task.training_counts[length], "length": length, "sha256": _digest(training[length])}
                for length, split in splits.items()
            },
            "valid": _write_split(folder, header, task, "valid", "valid", task.length, task.valid_examples),
        },
        "config": task.model_dump(mode="json", exclude_defaults=True, exclude=TEST_KEYS),
    }
    if isinstance(longest, Windows):
        np.save(folder / "tokens.npy", longest.tokens)  # the same for every length
        meta["tokens"] = sha256(folder / "tokens.npy")
    if (tokenizer := task.tokenizer()) is not None:
        (folder / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
        meta["tokenizer"] = hashlib.sha256(tokenizer.encode()).hexdigest()
    _write_meta(folder, meta, task)


def _write_test(folder: Path, header: dict[str, Any], task: Task) -> None:
    meta = {
        **header,
        "lengths": list(task.lengths),
        "splits": {
            f"test_{length}": _write_split(folder, header, task, f"test_{length}", "test", length, task.test_count(length))
            for length in task.lengths
        },
        "config": task.model_dump(mode="json", exclude_defaults=True),
    }
    if (extents := task.extents()) is not None:
        np.savez(folder / "extents.npz", **extents._asdict())
        meta["extents"] = {name: int(column.sum()) for name, column in extents._asdict().items()}
    if (overlap := task.overlap()) is not None:
        meta["overlap"] = overlap
    if (recalled := task.recalled()) is not None:
        masks = {f"{kind}_{length}": mask for length, split in recalled.items() for kind, mask in split._asdict().items()}
        np.savez(folder / "recalled.npz", **masks)
    _write_meta(folder, meta, task)


def _write_split(
    folder: Path, header: dict[str, Any], task: Task, file: str, split: str, length: int, count: int
) -> dict[str, Any]:
    """Write a split of examples; return its description for meta.json."""
    examples = task.examples(split, length, count, generator(header["data_seed"], header["task"], file)).compact()
    np.savez(folder / f"{file}.npz", inputs=examples.inputs, targets=examples.targets)
    return {"examples": len(examples.inputs), "length": length, "sha256": _digest(examples)}


def _write_meta(folder: Path, meta: dict[str, Any], task: Task) -> None:
    origin = task.origin()
    write_json(folder / "meta.json", {**meta, "origin": origin} if origin else meta)


def _digest(arrays: Iterable[ArrayLike]) -> str:
    digest = hashlib.sha256()
    for array in map(np.ascontiguousarray, arrays):
        digest.update(f"{array.dtype.str} {array.shape}".encode())
        digest.update(array.data)
    return digest.hexdigest()
