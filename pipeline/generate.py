"""data/<task>/: one .npz a split, `inputs` and `targets`, and a meta.json that says what they are.

Of text the training split is tokens.npy, all its tokens once, and in train.npz the `starts` of its windows and their `length`.
There are also extents.npz, what the answers of the test splits stand for, and spans.npz, what every token of the longest does;
recalled.npz, which answers stand in their context already, where that is asked; and tokenizer.json where one was learnt.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike

from cat.tasks.base import Task, Windows, generator
from pipeline.files import DATA, sha256, whole, write_json


def generate(name: str, task: Task, data_seed: int) -> None:
    """Writes every split of `task`. Raises ValueError where its source has no text."""
    splits = {"valid": ("valid", task.length, task.valid)}
    for length in task.lengths:
        splits[f"test_{length}"] = ("test", length, task.test)
    with whole(DATA / name) as folder:
        folder.mkdir()
        training = task.training(generator(data_seed, name, "train"))
        arrays = training._asdict()
        if isinstance(training, Windows):
            np.save(folder / "tokens.npy", arrays.pop("tokens"))
        np.savez(folder / "train.npz", **arrays)
        described = {"train": {"examples": task.train, "length": task.length, "sha256": _digest(training)}}
        for file, (split, length, count) in splits.items():
            examples = task.examples(split, length, count, generator(data_seed, name, file)).compact()
            np.savez(folder / f"{file}.npz", inputs=examples.inputs, targets=examples.targets)
            described[file] = {"examples": count, "length": length, "sha256": _digest(examples)}
        meta = {
            "task": name,
            "kind": task.kind,
            "vocabulary": task.vocabulary,
            "length": task.length,
            "lengths": list(task.lengths),
            "goal": task.goal,
            "autoregressive": task.autoregressive,
            "data_seed": data_seed,
            "splits": described,
            "config": task.model_dump(mode="json", exclude_defaults=True),
        }
        if isinstance(training, Windows):
            meta["tokens"] = sha256(folder / "tokens.npy")
        if (tokenizer := task.tokenizer()) is not None:
            (folder / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
            meta["tokenizer"] = hashlib.sha256(tokenizer.encode()).hexdigest()
        if (extents := task.extents()) is not None:
            np.savez(folder / "extents.npz", **extents._asdict())
            meta["extents"] = {name: int(column.sum()) for name, column in extents._asdict().items()}
        if (spans := task.spans()) is not None:
            np.savez_compressed(folder / "spans.npz", **spans._asdict())
        if (recalled := task.recalled()) is not None:
            masks = {f"{kind}_{length}": mask for length, of in recalled.items() for kind, mask in of._asdict().items()}
            np.savez(folder / "recalled.npz", **masks)
        if origin := task.origin():
            meta["origin"] = origin
        write_json(folder / "meta.json", meta)


def _digest(arrays: Iterable[ArrayLike]) -> str:
    digest = hashlib.sha256()
    for array in map(np.ascontiguousarray, arrays):
        digest.update(f"{array.dtype.str} {array.shape}".encode())
        digest.update(array.data)
    return digest.hexdigest()
