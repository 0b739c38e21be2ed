"""Train a small transformer on associative recall with torch attention and CAT.

    python examples/transformer.py

A sequence has eight keys with their values, then every key again; the target is the value that followed the key. The models
differ only in the argument `attention` and see the same data in the same order. CAT without convolutions is also trained, so the
convolutions are the only possible cause of a difference. Two blocks of plain attention can express recall: the first one copies
each key to the next token. This example shows how much they learn in a short training.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from cat import ConvolutionAugmentedAttention
from cat.tasks.recall import Recall
from cat.tasks.registry import IGNORE

TASK = Recall(
    kind="recall", ngram=1, keys=64, values=64, filler=1, pairs=8, queries="all", query_gap="uniform",
    length=36, multiples=(1,), train_examples=1, valid_examples=1, test_examples=1,
)  # fmt: skip
Attend = Callable[[int, int], nn.Module]
"""Build the attention of one block from its width and heads."""


class TorchAttention(nn.Module):
    """Causal attention of torch."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, bias=False, batch_first=True)

    def forward(self, x: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device)
        return self.attention(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0]


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, attention: nn.Module):
        super().__init__()
        self.attention_norm, self.attention = nn.LayerNorm(width), attention
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(x)


class Transformer(nn.Module):
    """Token and position embeddings, blocks, norm and head.

    `attention(width, heads)` builds the attention of one block.
    """

    def __init__(self, attention: Attend, *, vocabulary: int, length: int, width: int, heads: int, layers: int):
        super().__init__()
        self.token, self.position = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        for embedding in (self.token, self.position):
            nn.init.normal_(embedding.weight, std=width**-0.5)
        self.blocks = nn.Sequential(*(Block(width, attention(width, heads)) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Int[Tensor, "B L"]) -> Float[Tensor, "B L V"]:
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x)))


def draw(split: str, count: int, generator: np.random.Generator) -> tuple[Int[Tensor, "B L"], Int[Tensor, "B L"]]:
    """Draw sequences and targets: the value at each repeated key, IGNORE elsewhere."""
    examples = TASK.examples(split, TASK.length, count, generator)
    return torch.from_numpy(examples.inputs), torch.from_numpy(examples.targets)


def train(attention: Attend, *, steps: int, batch: int = 32, seed: int = 0) -> Transformer:
    """Train a model for `steps` steps, each on new sequences."""
    torch.manual_seed(seed)
    model = Transformer(attention, vocabulary=TASK.vocabulary, length=TASK.length, width=64, heads=2, layers=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps + 1)
    generator = np.random.default_rng(seed)
    for _ in range(steps):
        tokens, targets = draw("train", batch, generator)
        loss = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model


@torch.no_grad()
def accuracy(model: nn.Module, *, count: int = 1000, seed: int = 1) -> float:
    """Return the accuracy at the target positions of `count` new sequences."""
    tokens, targets = draw("test", count, np.random.default_rng(seed))
    is_target = targets != IGNORE
    return (model(tokens).argmax(-1) == targets)[is_target].double().mean().item()


def main(steps: int = 300) -> None:
    torch.set_num_threads(1)
    attentions: dict[str, Attend] = {
        "torch's attention": TorchAttention,
        "CAT, no convolutions": ConvolutionAugmentedAttention,
        "CAT, kernel size 4": partial(ConvolutionAugmentedAttention, conv_q=4, conv_k=4, conv_v=4),
    }
    print(f"associative recall, {steps} steps; chance ({TASK.pairs} values in the sequence): {1 / TASK.pairs:.3f}")
    for name, attention in attentions.items():
        began = time.perf_counter()
        model = train(attention, steps=steps)
        parameters = sum(p.numel() for p in model.parameters())
        print(f"{name:24} accuracy {accuracy(model):.3f}   {parameters:,} parameters, {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
