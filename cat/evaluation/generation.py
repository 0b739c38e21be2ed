"""A sequence that goes on by a model's own choices, token by token, nothing read twice."""

import math
from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cat.model import SequenceModel
from cat.types import Tokens


def generate(
    model: SequenceModel,
    prompt: Tokens,
    count: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Int[Tensor, " B"]]:
    """The `count` tokens that follow upon each `prompt`, one of every sequence at a time, on the device of the prompt.

    Drawn with the logits divided by `temperature`, of the `top_k` most likely tokens alone where that is given; at temperature 0
    the most likely one. `generator` is one of the CPU, where tokens are drawn on whatever device the model is. Raises ValueError
    where the sequence gets longer than learned positions reach, and, in drawing, where logits are no finite numbers.
    """
    if count < 1 or prompt.shape[1] < 1:
        raise ValueError(f"{count} tokens after a prompt of {prompt.shape[1]}: there must be one of each at least")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature = {temperature} must be a number from 0 on")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k = {top_k} leaves nothing to choose from")
    model.check_length(prompt.shape[1] + count - 1)  # the last one is not read
    return _generate(model, prompt, count, temperature, top_k, generator)


@torch.no_grad()
def _generate(
    model: SequenceModel, prompt: Tokens, count: int, temperature: float, top_k: int | None, generator: torch.Generator | None
) -> Iterator[Int[Tensor, " B"]]:
    logits, caches = model.step(prompt)
    for left in range(count - 1, -1, -1):
        tokens = choose(logits, temperature=temperature, top_k=top_k, generator=generator)
        yield tokens
        if left:
            logits, caches = model.step(tokens[:, None], caches)


def choose(
    logits: Float[Tensor, "B V"], *, temperature: float, top_k: int | None = None, generator: torch.Generator | None = None
) -> Int[Tensor, " B"]:
    """A token a row: drawn from softmax(logits / temperature) over the `top_k` largest, the largest one at temperature 0.

    Raises ValueError where logits are no finite numbers.
    """
    if not logits.isfinite().all():
        raise ValueError("the model's logits are no finite numbers, as after a training that diverged")
    if temperature == 0:
        return logits.argmax(-1)
    best, tokens = logits.double().topk(min(top_k or logits.shape[-1], logits.shape[-1]))
    # The largest is taken off first, so that no temperature is too close to 0.
    shares = ((best - best[:, :1]) / temperature).softmax(-1)
    place = torch.multinomial(shares.cpu(), 1, generator=generator).to(logits.device)
    return tokens.gather(1, place)[:, 0]
