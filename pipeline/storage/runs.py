"""runs/<task>/<variant>/: weights of every seed, history.csv, summary.json; and a trained model back from them."""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray
from pydantic import TypeAdapter

from cat.mixers.registry import AnyModel
from cat.tasks.registry import Windows
from pipeline.storage.files import read_json, readable
from pipeline.storage.paths import RUNS
from pipeline.storage.task_data import read_split, read_training

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from cat.evaluation.scores import Split, TrainingSplit
    from cat.model import SequenceModel


def folder(task: str, variant: str) -> Path:
    return RUNS / task / variant


def weights_path(task: str, variant: str, seed: int) -> Path:
    return folder(task, variant) / f"seed_{seed}.safetensors"


def read_summary(task: str, variant: str) -> Any:
    """Raises ValueError where the cell has not been trained, or something else is in its file."""
    return _read_summary(folder(task, variant) / "summary.json")


def _read_summary(path: Path) -> Any:
    summary = read_json(path)
    with readable(path, "the summary of a cell"):
        return {**summary, "model": summary["model"], "runs": summary["runs"]}


def diverged(task: str, variant: str) -> set[int]:
    """The seeds whose run at the chosen learning rate has no weights, since it diverged."""
    summary = read_summary(task, variant)
    chosen = summary["learning_rate"]
    return {run["seed"] for run in summary["runs"] if run["learning_rate"] == chosen and run["stop"] == "diverged"}


def digest(task: str, variant: str) -> str:
    """Of the summary, which has the validation scores of every run: tells this result from another of the same name."""
    return hashlib.sha256((folder(task, variant) / "summary.json").read_bytes()).hexdigest()


def load_model(path: str | Path) -> SequenceModel:
    """The trained model of a weights file, which carries its own configuration.

    Raises ValueError where it is none, with the seeds that there are, where its weights are not those of its configuration, or
    where the summary beside it is about another model.
    """
    # Only here: the tables and MLflow read summaries, and need no torch for that.
    from safetensors import safe_open

    from cat.model import SequenceModel

    path = Path(path)
    others = sorted((other.stem for other in path.parent.glob("seed_*.safetensors")), key=lambda stem: (len(stem), stem))
    if others and not path.exists():
        has = f"{path.parent} has {', '.join(others)}"
        raise ValueError(f"{path}: is missing; {has}; `dvc repro` trains the seeds of params.yaml")
    with readable(path, "a weights file of this project"):
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["model"])
            weights: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a mapping
        config = TypeAdapter(AnyModel).validate_python(about["config"])
        model = SequenceModel(config, vocabulary=about["vocabulary"], length=about["length"])
        model.load_state_dict(weights)
    summary = path.with_name("summary.json")
    if summary.exists() and _read_summary(summary)["model"] != about:
        raise ValueError(f"{path}: is of another model than {summary}; remove it and run `dvc checkout` or `dvc repro`")
    return model.eval()


def split(task: str, name: str, device: torch.device) -> Split:
    """The split `name` of the task's data as tensors on a device."""
    from cat.evaluation.scores import Split

    return Split.of(*(_on(device, array) for array in read_split(task, name)))


def training_split(task: str, device: torch.device) -> TrainingSplit:
    """The training split of the task's data on a device; on a CPU the tokens of a text stay in their file, mapped into memory."""
    import torch

    from cat.evaluation.scores import Split, TextSplit

    read = read_training(task)
    if not isinstance(read, Windows):
        return Split.of(*(_on(device, array) for array in read))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that a mapped file cannot be written to, which nothing does
        tokens = torch.from_numpy(read.tokens)
    return TextSplit(_indexable(tokens, device), torch.from_numpy(read.starts).to(device), read.length)


def _on(device: torch.device, array: NDArray[Any]) -> Tensor:
    import torch

    return _indexable(torch.tensor(array), device)


def _indexable(tensor: Tensor, device: torch.device) -> Tensor:
    """On a device, in a type of which rows can be taken there: on a GPU that is no unsigned one but uint8."""
    import torch

    if device.type != "cpu" and tensor.dtype in (torch.uint16, torch.uint32):
        tensor = tensor.int() if tensor.dtype == torch.uint16 else tensor.long()
    return tensor.to(device)


def max_length(task: str, variant: str) -> int | None:
    """The longest sequence that the trained variant can read; None where there is no limit."""
    about = read_summary(task, variant)["model"]
    return TypeAdapter(AnyModel).validate_python(about["config"]).max_length(about["length"])
