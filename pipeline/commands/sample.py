"""A trained model of a text goes on with a prompt: printed as it comes, nothing written."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from cat.evaluation.generation import generate
from cat.tasks.tokenizer import Bytes, Tokenizer, load
from pipeline.config.errors import printable
from pipeline.config.grid import variants_on
from pipeline.config.study import Study
from pipeline.runtime import workers
from pipeline.runtime.devices import resolve_device
from pipeline.storage import runs
from pipeline.storage.files import read_json, readable
from pipeline.storage.paths import DATA


class SamplingOptions(NamedTuple):
    """How the tokens are chosen."""

    tokens: int
    temperature: float
    """0 takes the most likely token."""
    top_k: int | None
    seed: int


def sample(
    study: Study, task: str, variant: str, prompt: bytes, drawing: SamplingOptions, *, model_seed: int, device: str
) -> Iterator[str]:
    """What follows upon `prompt` in the eyes of the variant that was trained on the task with one seed, as it comes.

    Raises ValueError where there is no such model or nothing to go on with.
    """
    where = resolve_device(device)
    _check(study, task, variant)
    tokenizer = _tokenizer(task)
    path = runs.weights_path(task, variant, model_seed)
    workers.prepare()
    model = runs.load_model(path).to(where)
    if (vocabulary := model.embedding.token.num_embeddings) != tokenizer.size:
        raise ValueError(f"{path}: knows {vocabulary} tokens, and {DATA / task} has {tokenizer.size}; run `dvc repro`")
    read = _encoded(prompt, tokenizer)
    chosen = generate(
        model,
        torch.tensor([read], device=where),
        drawing.tokens,
        temperature=drawing.temperature,
        top_k=drawing.top_k,
        generator=torch.Generator().manual_seed(drawing.seed),
    )
    return tokenizer.decode((int(token) for token in chosen), after=read[-1])


def _check(study: Study, task: str, variant: str) -> None:
    if (kind := study.tasks[task].data.kind) != "text":
        raise ValueError(f"{task} is no text but of kind {kind}; a task of kind text is needed")
    if variant not in (trained := variants_on(study, task)):
        raise ValueError(f"{variant} is not trained on {task}; these are: {', '.join(trained)}")
    if not (DATA / task / "meta.json").exists():
        raise ValueError(f"{DATA / task} is not there; run `dvc repro generate@{task}`")


def _tokenizer(task: str) -> Tokenizer:
    """The one that the task's data were made with."""
    about, path = DATA / task / "meta.json", DATA / task / "tokenizer.json"
    meta = read_json(about)
    with readable(about, "the description of a task's data"):
        if meta["config"].get("tokens", "bytes") == "bytes":
            return Bytes()
    with readable(path, "a tokenizer"):
        return load(path.read_text(encoding="utf-8"))


def _encoded(prompt: bytes, tokenizer: Tokenizer) -> list[int]:
    try:
        prompt.decode()
    except UnicodeDecodeError:
        raise ValueError("the prompt is no text in UTF-8") from None
    read: list[int] = tokenizer.encode(np.frombuffer(prompt, dtype=np.uint8)).tolist()
    if not read:
        raise ValueError("the prompt is empty; there must be something to go on with")
    return read


def shown(text: str) -> str:
    """`text` with what a terminal would take for a command escaped: a model of bytes may choose any of them."""
    return "".join(letter if letter in "\n\t" else printable(letter) for letter in text)
