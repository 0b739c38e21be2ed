"""Read runs/<task>/<variant>/: one weights file per seed, history.csv and summary.json."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from cat.mixers.registry import read_model
from cat.tasks.registry import Windows
from pipeline.storage.files import read_json, readable
from pipeline.storage.paths import DATA, RUNS
from pipeline.storage.task_data import read_split, read_training
from pipeline.storage.tokenizers import read_tokenizer

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from cat.evaluation.scores import MixedSplit, Split, TrainingSplit
    from cat.model import SequenceModel
    from cat.tasks.tokenizer import Tokenizer


def folder(task: str, variant: str) -> Path:
    return RUNS / task / variant


def weights_path(task: str, variant: str, seed: int, learning_rate: float | None = None) -> Path:
    """The weights at the chosen learning rate, or at another one."""
    start = "" if learning_rate is None else f"rate_{learning_rate}_"
    return folder(task, variant) / f"{start}seed_{seed}.safetensors"


def read_summary(task: str, variant: str) -> Any:
    """Read summary.json of a cell. Raises ValueError if it is missing or damaged."""
    return _read_summary(folder(task, variant) / "summary.json")


def _read_summary(path: Path) -> Any:
    summary = read_json(path)
    with readable(path, "the summary of a cell"):
        return {**summary, "model": summary["model"], "runs": summary["runs"]}


def diverged(task: str, variant: str) -> set[int]:
    """Return the seeds that diverged at the chosen learning rate; they have no weights."""
    summary = read_summary(task, variant)
    chosen = summary["learning_rate"]
    return {run["seed"] for run in summary["runs"] if run["learning_rate"] == chosen and run["stop"] == "diverged"}


def digest(task: str, variant: str) -> str:
    """Return the SHA-256 of the summary of a cell.

    The summary contains the validation scores of every run, so the digest identifies this result.
    """
    return hashlib.sha256((folder(task, variant) / "summary.json").read_bytes()).hexdigest()


def load_model(path: str | Path) -> SequenceModel:
    """Load a trained model from a weights file, whose metadata holds the configuration.

    Raises ValueError if the file is missing or damaged, if the weights do not fit the configuration, or if summary.json in the
    same folder describes another model.
    """
    # Imported late: reading summaries, as the tables and MLflow do, must not import torch.
    from safetensors import safe_open

    from cat.model import SequenceModel

    path = Path(path)
    seeds = sorted((file.stem for file in path.parent.glob("seed_*.safetensors")), key=lambda stem: (len(stem), stem))
    if seeds and not path.exists():
        available = f"{path.parent} has {', '.join(seeds)}"
        raise ValueError(f"{path}: is missing; {available}; `dvc repro` trains the seeds of params.yaml")
    with readable(path, "a weights file of this project"):
        with safe_open(path, framework="pt") as file:
            model_info = json.loads((file.metadata() or {})["model"])
            weights: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a mapping
        config = read_model(model_info["config"])
        model = SequenceModel(config, vocabulary=model_info["vocabulary"], length=model_info["length"])
        model.load_state_dict(weights)
    summary = path.with_name("summary.json")
    if summary.exists() and _read_summary(summary)["model"] != model_info:
        raise ValueError(f"{path}: is of another model than {summary}; remove it and run `dvc checkout` or `dvc repro`")
    return model.eval()


def load_text_model(task: str, variant: str, seed: int) -> tuple[SequenceModel, Tokenizer]:
    """Load a trained language model, and the tokenizer of its task.

    Raises ValueError as `load_model` and `read_tokenizer` do, and if the vocabularies differ.
    """
    tokenizer, path = read_tokenizer(task), weights_path(task, variant, seed)
    model = load_model(path)
    if (vocabulary := model.embedding.token.num_embeddings) != tokenizer.size:
        raise ValueError(
            f"{path}: has a vocabulary of {vocabulary} tokens, {DATA / task} of {tokenizer.size}. Fix: run `dvc repro`"
        )
    return model, tokenizer


def split(task: str, name: str, device: torch.device) -> Split:
    """Read the split `name` of `task` as tensors on `device`."""
    from cat.evaluation.scores import Split

    return Split.of(*(_to_device(array, device) for array in read_split(task, name)))


def training_split(task: str, device: torch.device) -> TrainingSplit | MixedSplit:
    """Read the training split of `task` as tensors on `device`, one split per training length if there are several.

    On a CPU the tokens of a text stay in their file, which is memory-mapped.
    """
    from cat.evaluation.scores import MixedSplit

    splits = tuple(_training_splits(task, device))
    return splits[0] if len(splits) == 1 else MixedSplit(splits)


def _training_splits(task: str, device: torch.device) -> Iterator[TrainingSplit]:
    import torch

    from cat.evaluation.scores import Split, TextSplit

    tokens: Tensor | None = None
    for data in read_training(task):
        if not isinstance(data, Windows):
            yield Split.of(*(_to_device(array, device) for array in data))
            continue
        if tokens is None:
            with warnings.catch_warnings():
                # torch warns that the mapped file is read-only; nothing writes to it.
                warnings.simplefilter("ignore", UserWarning)
                tokens = _indexable(torch.from_numpy(data.tokens), device)
        yield TextSplit(tokens, torch.from_numpy(data.starts).to(device), data.length)


def _to_device(array: NDArray[Any], device: torch.device) -> Tensor:
    import torch

    return _indexable(torch.tensor(array), device)


def _indexable(tensor: Tensor, device: torch.device) -> Tensor:
    """Move `tensor` to `device` in a type that can be indexed there; on a GPU, uint16 and uint32 cannot."""
    import torch

    if device.type != "cpu" and tensor.dtype in (torch.uint16, torch.uint32):
        tensor = tensor.int() if tensor.dtype == torch.uint16 else tensor.long()
    return tensor.to(device)


def max_length(task: str, variant: str) -> int | None:
    """Return the longest sequence that the trained model accepts, or None if there is no limit."""
    model_info = read_summary(task, variant)["model"]
    return read_model(model_info["config"]).max_length(model_info["length"])
