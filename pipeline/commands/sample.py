"""Continue a prompt with a trained language model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from cat.evaluation.generation import generate
from cat.tasks.tokenizer import Tokenizer
from pipeline.config.errors import printable
from pipeline.config.grid import seeds_of, variants_on
from pipeline.config.study import Study
from pipeline.runtime import workers
from pipeline.runtime.devices import resolve_device
from pipeline.storage import runs
from pipeline.storage.paths import DATA
from pipeline.storage.tokenizers import read_tokenizer


class SamplingOptions(NamedTuple):
    """How tokens are sampled."""

    tokens: int
    temperature: float
    """0 always takes the most likely token."""
    top_k: int | None
    seed: int


def sample(
    study: Study, task: str, variant: str, prompt: bytes, options: SamplingOptions, *, model_seed: int | None, device: str
) -> Iterator[str]:
    """Yield the continuation of `prompt` token by token, by the model of `variant`, `task` and `model_seed`.

    Without `model_seed`, it is the model of the cell's first seed. Raises ValueError if the model does not exist or the prompt is
    empty.
    """
    where = resolve_device(device)
    _check(study, task, variant)
    tokenizer = read_tokenizer(task)
    seed = seeds_of(study, task, variant)[0] if model_seed is None else model_seed
    path = runs.weights_path(task, variant, seed)
    workers.prepare()
    model = runs.load_model(path).to(where)
    if (vocabulary := model.embedding.token.num_embeddings) != tokenizer.size:
        raise ValueError(
            f"{path}: has a vocabulary of {vocabulary} tokens, {DATA / task} of {tokenizer.size}. Fix: run `dvc repro`"
        )
    prompt_tokens = _encode(prompt, tokenizer)
    new_tokens = generate(
        model,
        torch.tensor([prompt_tokens], device=where),
        options.tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        generator=torch.Generator().manual_seed(options.seed),
    )
    return tokenizer.decode((int(token) for token in new_tokens), after=prompt_tokens[-1])


def _check(study: Study, task: str, variant: str) -> None:
    if (kind := study.tasks[task].data.kind) != "text":
        raise ValueError(f"{task} is of kind {kind}. Fix: choose a task of kind text")
    if variant not in (trained := variants_on(study, task)):
        raise ValueError(f"{variant} is not trained on {task}. Fix: choose from {', '.join(trained)}")
    if not (DATA / task / "meta.json").exists():
        raise ValueError(f"{DATA / task}: is missing. Fix: run `dvc repro generate@{task}`")


def _encode(prompt: bytes, tokenizer: Tokenizer) -> list[int]:
    try:
        prompt.decode()
    except UnicodeDecodeError:
        raise ValueError("the prompt is not UTF-8") from None
    tokens: list[int] = tokenizer.encode(np.frombuffer(prompt, dtype=np.uint8)).tolist()
    if not tokens:
        raise ValueError("the prompt is empty. Fix: give at least one character")
    return tokens


def escape_for_terminal(text: str) -> str:
    """Escape control characters: a model of bytes may generate terminal commands."""
    return "".join(letter if letter in "\n\t" else printable(letter) for letter in text)
