"""Autoregressive sampling, token by token, with a cache: each token is computed once."""

import math
from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cat.evaluation.scores import evaluation_mode
from cat.mixers.packing import align_prompts
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
    attention_mask: Tensor | None = None,
) -> Iterator[Int[Tensor, " B"]]:
    """Yield the `count` tokens after each `prompt`: one token per sequence at a time, on the device of the prompt.

    Tokens are drawn from softmax(logits / temperature), over the `top_k` most likely tokens if given. At temperature 0 the most
    likely token is taken. `generator` must be a CPU generator: tokens are drawn on the CPU for every device.

    `attention_mask` (B, L) is 1 or True at the tokens of prompts of unequal length, and 0 or False at their padding, on the left
    or on the right. The other prompts do not change a continuation.

    Raises ValueError before the first token if an argument is out of range, or if a sequence becomes longer than the learned
    positions. Raises ValueError while sampling if the logits are not finite.
    """
    if count < 1 or prompt.shape[1] < 1:
        raise ValueError(f"{count} tokens after a prompt of {prompt.shape[1]} tokens: both must be at least 1")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature = {temperature}: must be a finite number of at least 0")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k = {top_k}: must be at least 1")
    prompts = None if attention_mask is None else align_prompts(prompt, attention_mask)
    longest = prompt.shape[1] - (0 if prompts is None else int(prompts.padding.min()))
    model.check_length(longest + count - 1)  # the last token is no input
    return _generate(model, prompt, count, temperature, top_k, generator, attention_mask)


@torch.no_grad()
def _generate(
    model: SequenceModel,
    prompt: Tokens,
    count: int,
    temperature: float,
    top_k: int | None,
    generator: torch.Generator | None,
    attention_mask: Tensor | None,
) -> Iterator[Int[Tensor, " B"]]:
    with evaluation_mode(model):
        logits, caches = model.step(prompt, attention_mask=attention_mask)
    for remaining in range(count - 1, -1, -1):
        tokens = choose(logits, temperature=temperature, top_k=top_k, generator=generator)
        yield tokens
        if remaining:
            with evaluation_mode(model):
                logits, caches = model.step(tokens[:, None], caches)


def choose(
    logits: Float[Tensor, "B V"], *, temperature: float, top_k: int | None = None, generator: torch.Generator | None = None
) -> Int[Tensor, " B"]:
    """Draw one token per row from softmax(logits / temperature) over the `top_k` largest logits.

    At temperature 0, return the largest. Raises ValueError if the logits are not finite.
    """
    if not logits.isfinite().all():
        raise ValueError("the logits are not finite, for example because the training diverged")
    if temperature == 0:
        return logits.argmax(-1)
    best, tokens = logits.double().topk(min(top_k or logits.shape[-1], logits.shape[-1]))
    # Subtract the maximum first, so that dividing by a temperature near 0 does not overflow.
    probabilities = ((best - best[:, :1]) / temperature).softmax(-1)
    drawn = torch.multinomial(probabilities.cpu(), 1, generator=generator).to(logits.device)
    return tokens.gather(1, drawn)[:, 0]
