"""data/<task>/: what training reads, a .npz each of the training and the validation split, `inputs` and `targets`.

Of text the training split is tokens.npy, all its tokens once, and in train.npz the `starts` of its windows and their `length`;
there is also tokenizer.json where one was learnt. heldout/<task>/ has a .npz for each test split and, of text, extents.npz, what
the answers of the test splits stand for, spans.npz, what every token of the longest does, and recalled.npz, which answers stand
in their context already, where that is asked. In both a meta.json says what they are.

Nothing in data/<task>/ depends on how many test sequences there are and how long they are: others train nothing again.
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

TEST = {"test_examples", "multiples"}
"""What a task says of its test splits alone."""


def generate(name: str, task: Task, data_seed: int) -> None:
    """Writes every split of `task`, or none. Raises ValueError where its source has no text."""
    about = {"task": name, "kind": task.kind, "data_seed": data_seed}
    with atomic_write(DATA / name) as data:
        data.mkdir()
        _write_training(data, about, task)
        with atomic_write(HELDOUT / name) as heldout:
            heldout.mkdir()
            _write_test(heldout, about, task)


def _write_training(folder: Path, about: dict[str, Any], task: Task) -> None:
    name, data_seed = about["task"], about["data_seed"]
    training = task.training(generator(data_seed, name, "train"))
    arrays = training._asdict()
    if isinstance(training, Windows):
        np.save(folder / "tokens.npy", arrays.pop("tokens"))
    np.savez(folder / "train.npz", **arrays)
    meta = {
        **about,
        "vocabulary": task.vocabulary,
        "length": task.length,
        "goal": task.goal,
        "autoregressive": task.autoregressive,
        "splits": {
            "train": {"examples": task.train_examples, "length": task.length, "sha256": _digest(training)},
            "valid": _write_split(folder, about, task, "valid", "valid", task.length, task.valid_examples),
        },
        "config": task.model_dump(mode="json", exclude_defaults=True, exclude=TEST),
    }
    if isinstance(training, Windows):
        meta["tokens"] = sha256(folder / "tokens.npy")
    if (tokenizer := task.tokenizer()) is not None:
        (folder / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
        meta["tokenizer"] = hashlib.sha256(tokenizer.encode()).hexdigest()
    _write_meta(folder, meta, task)


def _write_test(folder: Path, about: dict[str, Any], task: Task) -> None:
    meta = {
        **about,
        "lengths": list(task.lengths),
        "splits": {
            f"test_{length}": _write_split(folder, about, task, f"test_{length}", "test", length, task.test_examples)
            for length in task.lengths
        },
        "config": task.model_dump(mode="json", exclude_defaults=True),
    }
    if (extents := task.extents()) is not None:
        np.savez(folder / "extents.npz", **extents._asdict())
        meta["extents"] = {name: int(column.sum()) for name, column in extents._asdict().items()}
    if (spans := task.spans()) is not None:
        np.savez_compressed(folder / "spans.npz", **spans._asdict())
    if (recalled := task.recalled()) is not None:
        masks = {f"{kind}_{length}": mask for length, of in recalled.items() for kind, mask in of._asdict().items()}
        np.savez(folder / "recalled.npz", **masks)
    _write_meta(folder, meta, task)


def _write_split(
    folder: Path, about: dict[str, Any], task: Task, file: str, split: str, length: int, count: int
) -> dict[str, Any]:
    """Writes a split of examples; what there is to say of it."""
    examples = task.examples(split, length, count, generator(about["data_seed"], about["task"], file)).compact()
    np.savez(folder / f"{file}.npz", inputs=examples.inputs, targets=examples.targets)
    return {"examples": count, "length": length, "sha256": _digest(examples)}


def _write_meta(folder: Path, meta: dict[str, Any], task: Task) -> None:
    origin = task.origin()
    write_json(folder / "meta.json", {**meta, "origin": origin} if origin else meta)


def _digest(arrays: Iterable[ArrayLike]) -> str:
    digest = hashlib.sha256()
    for array in map(np.ascontiguousarray, arrays):
        digest.update(f"{array.dtype.str} {array.shape}".encode())
        digest.update(array.data)
    return digest.hexdigest()
