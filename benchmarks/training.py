"""Benchmarks of a training step of recall and of text, and of an ensemble of all runs of a cell."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.data import mqar
from benchmarks.measure import COST, Benchmark, Case, NotRun, Work, compared, same_shapes
from cat.config import ModelConfig, TrainingConfig
from cat.evaluation.scores import Split
from cat.mixers.registry import model_config
from cat.model import SequenceModel
from cat.seeding import generator
from cat.tasks.base import IGNORE
from cat.training.ensemble import Ensemble
from cat.training.fit import build_model, mean_loss, split_by_weight_decay
from cat.training.optimizer import AdamW

MODEL = model_config(mixer="attention", width=64, layers=1, heads=1, conv_q=4, conv_k=4, conv_v=4)
RATE, CLIP, REPLICAS_TARGET = 1e-3, 1.0, 6
TEXT_WIDTH, TEXT_LAYERS, TEXT_HEADS, TEXT_VOCABULARY = 128, 3, 4, 1024
TEXT_MODEL = model_config(
    mixer="attention", width=TEXT_WIDTH, layers=TEXT_LAYERS, heads=TEXT_HEADS, mlp=4, conv_q=4, conv_k=4, conv_v=4
)
"""The language models of presets/text-cpu.yaml, with a convolution of queries, keys and values."""
TRAINING = TrainingConfig(
    steps=1, batch=1, weight_decay=0.0, grad_clip=CLIP, warmup=0.0, eval_every=1, early_stop_accuracy=1.0, early_stop_patience=1
)


def step(vocabulary: int, *, target: float, batch: int = 64) -> Benchmark:
    """Forward, loss, backward, clipping and AdamW: as in `fit`, against a plain training loop in a process of its own."""
    case = Case(
        name=f"batch {batch}, 4 pairs in 64 tokens, width 64, 1 layer",
        ours=partial(project_step, vocabulary, batch),
        other=partial(plain_step, vocabulary, batch),
        sides=("this project", "plain loop"),
        target=target,
        own_process=True,
        count=(64 * batch, "tokens"),
    )
    return Benchmark(
        what=f"A training step of recall, vocabulary {vocabulary:,}, against a plain PyTorch loop, which computes logits at every"
        " position, in a process of its own with the default memory allocator",
        target=f"{target:g} times as fast",
        figures=compared(lambda device: [case]),
    )


def text(length: int, *, target: float, tokens: int = 2048) -> Benchmark:
    """The step of a language model with convolutions, against a PyTorch transformer of the same size without them."""
    batch = tokens // length

    def cases(device: str) -> list[Case]:
        if device != "cpu":
            raise NotRun("needs a CPU: on a GPU, `fit` records graphs")
        return [case]

    case = Case(
        name=f"{batch} x {length:,} tokens, width {TEXT_WIDTH}, {TEXT_LAYERS} layers",
        ours=partial(text_step, batch, length),
        other=partial(plain_text_step, batch, length),
        sides=("CAT-QKV", "transformer"),
        unit=COST,
        target=target,
        agree=same_shapes,  # the models differ
        own_process=True,
        count=(batch * length, "tokens"),
    )
    return Benchmark(
        what=f"A training step of a language model with kernel size 4 on q, k and v, {length:,} tokens, against a plain PyTorch"
        " transformer of the same size in a process of its own with the default memory allocator",
        target=f"{target:g} times the time",
        figures=compared(cases),
    )


def project_step(vocabulary: int, size: int, device: str, seed: int = 0) -> Work:
    """Prepare the step of `fit`. On a GPU, the step of `fit_ensemble`, which trains single models there too."""
    if device == "cuda":
        step = ensemble_step(1, size, device, vocabulary=vocabulary, first=seed)
        return lambda: step()[0]
    model, inputs, targets = prepare(vocabulary, size, device, seed)
    return fit_step(model, Split.of(inputs, targets).rows(slice(None)))


def text_step(batch: int, length: int, device: str, config: ModelConfig = TEXT_MODEL) -> Work:
    """Prepare the step of `fit` for a language model."""
    inputs, targets = text_batch(batch, length, device)
    model = build_model(config, vocabulary=TEXT_VOCABULARY, length=length, seed=0).to(device)
    return fit_step(model, Split.of(inputs, targets).rows(slice(None)))


def fit_step(model: SequenceModel, batch: Split) -> Work:
    """Return the step of `fit` for one batch."""
    decayed, others = split_by_weight_decay(model)
    optimizer = AdamW(decayed, others, weight_decay=0.0, grad_clip=CLIP)

    def work() -> Tensor:
        loss = mean_loss(model, batch)
        loss.backward()
        optimizer.step(RATE)
        return loss.detach()

    return work


def plain_step(vocabulary: int, size: int, device: str) -> Work:
    """Prepare the step of most training loops, such as Zoology's."""
    model, inputs, targets = prepare(vocabulary, size, device)
    return plain_loop(model, partial(plain_logits, model), inputs, targets)


def plain_text_step(batch: int, length: int, device: str) -> Work:
    """Prepare the step of a plain transformer."""
    torch.manual_seed(0)
    model = PlainTransformer().to(device)
    return plain_loop(model, model, *text_batch(batch, length, device), fused=True)


def plain_loop(
    model: nn.Module, logits: Callable[[Tensor], Tensor], inputs: Tensor, targets: Tensor, *, fused: bool | None = None
) -> Work:
    """Return a step of a plain training loop with PyTorch's loss, clipping and AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0, fused=fused)

    def work() -> Tensor:
        loss = F.cross_entropy(logits(inputs).flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        return loss.detach()

    return work


class PlainTransformer(nn.Module):
    """A transformer of PyTorch's own parts, of the size of TEXT_MODEL: one product for q, k and v, and its fused attention."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TEXT_VOCABULARY, TEXT_WIDTH)
        self.blocks = nn.ModuleList(PlainBlock() for _ in range(TEXT_LAYERS))
        self.norm = nn.LayerNorm(TEXT_WIDTH)
        self.head = nn.Linear(TEXT_WIDTH, TEXT_VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class PlainBlock(nn.Module):
    """A pre-norm block: attention, then an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(TEXT_WIDTH), nn.LayerNorm(TEXT_WIDTH)
        self.qkv, self.out = nn.Linear(TEXT_WIDTH, 3 * TEXT_WIDTH, bias=False), nn.Linear(TEXT_WIDTH, TEXT_WIDTH, bias=False)
        self.mlp = nn.Sequential(nn.Linear(TEXT_WIDTH, 4 * TEXT_WIDTH), nn.GELU(), nn.Linear(4 * TEXT_WIDTH, TEXT_WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.attention_norm(x)).unflatten(-1, (3, TEXT_HEADS, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.mlp_norm(x))


def text_batch(batch: int, length: int, device: str) -> tuple[Tensor, Tensor]:
    """Return random tokens and their next tokens."""
    tokens = torch.randint(TEXT_VOCABULARY, (batch, length + 1), generator=torch.Generator().manual_seed(0)).to(device)
    return tokens[:, :-1], tokens[:, 1:]


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
