"""Benchmarks of a training step, and of an ensemble of all runs of a cell."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.data import mqar
from benchmarks.measure import Benchmark, Case, NotRun, Work, compared, give_back_memory
from cat.config import TrainingConfig
from cat.evaluation.scores import Split
from cat.mixers.registry import model_config
from cat.model import SequenceModel
from cat.seeding import generator
from cat.tasks.base import IGNORE
from cat.training.ensemble import Ensemble
from cat.training.fit import build_model, mean_loss, split_by_weight_decay
from cat.training.optimizer import AdamW
from pipeline.runtime.processes import keep_memory

MODEL = model_config(mixer="attention", width=64, layers=1, heads=1, conv_q=4, conv_k=4, conv_v=4)
RATE, CLIP, REPLICAS_TARGET = 1e-3, 1.0, 6
TRAINING = TrainingConfig(
    steps=1, batch=1, weight_decay=0.0, grad_clip=CLIP, warmup=0.0, eval_every=1, early_stop_accuracy=1.0, early_stop_patience=1
)


def step(vocabulary: int, *, target: float, batch: int = 64) -> Benchmark:
    """Forward, loss, backward, clipping and AdamW: as in `fit`, against a plain training loop."""
    case = Case(
        name=f"batch {batch}, 4 pairs in 64 tokens, width 64, 1 layer",
        ours=partial(project_step, vocabulary, batch),
        other=partial(plain_step, vocabulary, batch),
        sides=("this project", "plain loop"),
        target=target,
        count=(64 * batch, "tokens"),
    )
    return Benchmark(
        what=f"A training step of recall, vocabulary {vocabulary:,}, against one that computes logits at every position"
        " and returns freed memory to the system",
        target=f"{target:g} times as fast",
        figures=compared(lambda device: [case]),
    )


def project_step(vocabulary: int, size: int, device: str, seed: int = 0) -> Work:
    """Prepare the step of `fit`. On a GPU, the step of `fit_ensemble`, which trains single models there too."""
    if device == "cuda":
        step = ensemble_step(1, size, device, vocabulary=vocabulary, first=seed)
        return lambda: step()[0]
    return training_step(*prepare(vocabulary, size, device, seed))


def training_step(model: SequenceModel, inputs: Tensor, targets: Tensor) -> Work:
    """Prepare the step of `fit` of a model, which returns the loss."""
    batch = Split.of(inputs, targets).rows(slice(None))
    decayed, others = split_by_weight_decay(model)
    optimizer = AdamW(decayed, others, weight_decay=0.0, grad_clip=CLIP)

    def work() -> Tensor:
        keep_memory()
        loss = mean_loss(model, batch)
        loss.backward()
        optimizer.step(RATE)
        return loss.detach()

    return work


def plain_step(vocabulary: int, size: int, device: str) -> Work:
    """Prepare the step of most training loops, such as Zoology's, in a process that returns freed memory as most do."""
    model, inputs, targets = prepare(vocabulary, size, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)

    def work() -> Tensor:
        give_back_memory()
        loss = F.cross_entropy(plain_logits(model, inputs).flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        return loss.detach()

    return work


def plain_logits(model: SequenceModel, tokens: Tensor) -> Tensor:
    """Compute every layer at every position, without projection look-up."""
    x = model.embedding(tokens)
    for block in model.layers():
        x = x + block.mixer(block.mixer_norm(x))
    return model.head(model.norm(x))


def prepare(vocabulary: int, size: int, device: str, seed: int = 0) -> tuple[SequenceModel, Tensor, Tensor]:
    """Build the model, inputs and targets; the same for the same arguments."""
    task = mqar(vocabulary)
    examples = task.examples("train", task.length, size, generator(seed, "benchmark", "train"))
    inputs, targets = (torch.tensor(array, device=device) for array in examples)
    return build_model(MODEL, vocabulary=task.vocabulary, length=task.length, seed=seed).to(device), inputs, targets


def replicas(*, count: int = 12, batch: int = 32, devices: Sequence[str] = ("cuda",)) -> Benchmark:
    """A step of `count` runs of a cell as an ensemble, against one after the other."""

    def cases(device: str) -> list[Case]:
        if device not in devices:
            raise NotRun("needs a GPU")
        return [
            Case(
                name=f"{count} members, batch {batch}, 4 pairs in 64 tokens, vocabulary 256, width 64, 1 layer",
                ours=partial(ensemble_step, count, batch),
                other=partial(one_by_one, count, batch),
                sides=("ensemble", "one after the other"),
                target=REPLICAS_TARGET,
                count=(64 * batch * count, "tokens"),
            )
        ]

    return Benchmark(
        what="The seeds and learning rates of a cell trained as an ensemble on a GPU, against one after the other",
        target=f"{REPLICAS_TARGET} times as fast",
        figures=compared(cases),
    )


def ensemble_step(count: int, size: int, device: str, *, vocabulary: int = 256, first: int = 0) -> Work:
    """Prepare the step of `fit_ensemble`, which returns the losses of all members."""
    models, inputs, targets = zip(*(prepare(vocabulary, size, device, first + index) for index in range(count)), strict=True)
    ensemble = Ensemble(models, [RATE] * count, config=TRAINING, precision="float32")
    splits = [Split.of(*examples).rows(slice(None)) for examples in zip(inputs, targets, strict=True)]
    batches = Split(*(torch.stack(tensors) for tensors in zip(*splits, strict=True)))
    return lambda: ensemble.step(batches, 1.0)[:, 0]


def one_by_one(count: int, size: int, device: str) -> Work:
    """Prepare the `project_step` of each run, called one after the other."""
    steps = [project_step(256, size, device, seed) for seed in range(count)]
    return lambda: torch.stack([step() for step in steps])
