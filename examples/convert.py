"""Put convolutions into a Llama model of transformers, and fine-tune it on associative recall.

    python examples/convert.py

The model is small and has random weights, so nothing is downloaded. For a model of your own, replace `build` by
`AutoModelForCausalLM.from_pretrained(...)`. The script checks that converting changes no output, trains the model without and
with convolutions on the same sequences, and saves and loads the second one.

A sequence has eight keys with their values, then every key again; the target is the value that followed the key.
"""

from __future__ import annotations

import tempfile
import time

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import cat
from cat.tasks.recall import Recall
from cat.tasks.registry import IGNORE

TASK = Recall(
    kind="recall", ngram=1, keys=64, values=64, filler=1, pairs=8, queries="all", query_gap="uniform",
    length=36, multiples=(1,), train_examples=1, valid_examples=1, test_examples=1,
)  # fmt: skip


def build(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=TASK.vocabulary, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, initializer_range=0.1,
        )
    )  # fmt: skip


def draw(split: str, count: int, generator: np.random.Generator) -> tuple[Int[Tensor, "B L"], Int[Tensor, "B L"]]:
    """Draw sequences and targets: the value at each repeated key, IGNORE elsewhere."""
    examples = TASK.examples(split, TASK.length, count, generator)
    return torch.from_numpy(examples.inputs), torch.from_numpy(examples.targets)


def train(model: nn.Module, *, steps: int, batch: int = 32, seed: int = 0) -> None:
    """Train `steps` steps, each on new sequences."""
    # The kernels have no weight decay, which would pull them from the identity to zero.
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps + 1)
    generator = np.random.default_rng(seed)
    model.train()
    for _ in range(steps):
        tokens, targets = draw("train", batch, generator)
        loss = F.cross_entropy(logits(model, tokens).flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


def logits(model: nn.Module, tokens: Int[Tensor, "B L"]) -> Float[Tensor, "B L V"]:
    return model(tokens, use_cache=False).logits


@torch.no_grad()
def accuracy(model: nn.Module, *, count: int = 1000, seed: int = 1) -> float:
    """Return the accuracy at the target positions of `count` new sequences."""
    tokens, targets = draw("test", count, np.random.default_rng(seed))
    is_target = targets != IGNORE
    return (logits(model, tokens).argmax(-1) == targets)[is_target].double().mean().item()


def main(steps: int = 250) -> None:
    torch.set_num_threads(1)
    tokens, _ = draw("test", 4, np.random.default_rng(0))
    original, converted = build(), cat.convert(build(), conv_q=4, conv_k=4, conv_v=4)
    print("outputs before training are the same to the bit:", torch.equal(logits(original, tokens), logits(converted, tokens)))
    print(f"associative recall, {steps} steps; chance ({TASK.pairs} values in the sequence): {1 / TASK.pairs:.3f}")
    for name, model in {"Llama": original, "Llama with convolutions": converted}.items():
        began = time.perf_counter()
        train(model, steps=steps)
        parameters = sum(p.numel() for p in model.parameters())
        print(f"{name:24} accuracy {accuracy(model):.3f}   {parameters:,} parameters, {time.perf_counter() - began:.0f} s")
    with tempfile.TemporaryDirectory() as folder:
        converted.save_pretrained(folder)
        loaded = cat.load_converted(LlamaForCausalLM, folder).eval()
    print("outputs of the saved model are the same to the bit:", torch.equal(logits(converted, tokens), logits(loaded, tokens)))


if __name__ == "__main__":
    main()
