"""A sequence model: embedding, `layers` blocks of a mixer, norm, head.

    x = E[tokens] (+ position)    x = x + mixer(norm(x))    x = x + mlp(norm(x))    logits = norm(x) W

A block without an MLP is its mixer alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from cat.config import ModelConfig
from cat.mixers.base import Cache, last_tokens
from cat.mixers.build import build_mixer
from cat.mixers.registry import AnyModel
from cat.ops.position import gather_positions, sinusoidal
from cat.types import Hidden, Positions, Tokens


class SequenceModel(nn.Module):
    """A causal model over `vocabulary` tokens, trained on sequences of `length` tokens.

    Raises ValueError, in words, where `config` cannot be trained at `length`.
    """

    def __init__(self, config: AnyModel, *, vocabulary: int, length: int):
        super().__init__()
        config.check_length(length)
        self.config, self.length = config, length
        self.max_length = config.max_length(length)
        self.embedding = Embedding(config, vocabulary, length)
        self.blocks = nn.ModuleList(Block(config, mixer, length) for mixer in config.mixers)
        self.norm = build_norm(config)
        self.head = nn.Linear(config.width, vocabulary, bias=False)
        nn.init.normal_(self.head.weight, std=config.width**-0.5)
        if config.tied:
            self.head.weight = self.embedding.token.weight

    def forward(self, tokens: Tokens) -> Float[Tensor, "B L V"]:
        """Logits of the next token at every position."""
        return self.head(self.hidden(tokens))

    def logits_at(self, tokens: Tokens, positions: Positions) -> Float[Tensor, "B A V"]:
        """Logits at positions `at` alone, none of which is there twice: most positions of a recall task ask nothing.

        Of the last block, only what they read is computed.
        """
        return self.head(self.hidden(tokens, None if positions.shape == tokens.shape else positions))

    def hidden(self, tokens: Tokens, positions: Positions | None = None) -> Float[Tensor, "B _ D"]:
        """What the head reads at positions `at`. Raises ValueError where the sequence is longer than learned positions reach."""
        self.check_length(tokens.shape[1])
        first, *others = self.layers()
        asked = None if others else positions
        projected = self.project_embeddings(tokens)
        x = self.embedding(tokens if projected is None or asked is None else tokens.gather(1, asked))
        x = first(x, asked, projected)
        for block in others:
            x = block(x, positions if block is others[-1] else None)
        return self.norm(x)

    def project_embeddings(self, tokens: Tokens) -> Float[Tensor, "B L P"] | None:
        """What the first block projects the tokens to, computed once for all places where one stands; None where that is more.

        It depends on nothing but the token, if no position is added to it.
        """
        if self.embedding.scheme != "none" or tokens.numel() <= len(self.embedding.token.weight):
            return None
        return F.embedding(tokens, self.layers()[0].project(self.embedding.token.weight))

    def step(self, tokens: Tokens, caches: Sequence[Cache] = ()) -> tuple[Float[Tensor, "B V"], list[Cache]]:
        """Logits of the token after `tokens`, which follow upon those of `memories`; and the memories of all of them.

        The logits are what `forward` has at the last position of the whole sequence. There is a memory a block, none before the
        first token. Raises ValueError as `hidden`.
        """
        caches = caches or [Cache()] * len(self.blocks)
        start = caches[0].length
        self.check_length(start + tokens.shape[1])
        projected, blocks, read = self.project_embeddings(tokens), self.layers(), list[Cache]()
        x = self.embedding(tokens if projected is None or len(blocks) > 1 else tokens[:, -1:], start)
        for block, cache in zip(blocks, caches, strict=True):
            x, cache = block.step(x, cache, projected if block is blocks[0] else None, last=block is blocks[-1])
            read.append(cache)
        return self.head(self.norm(x[:, 0])), read

    def check_length(self, length: int) -> None:
        """Raises ValueError where a sequence is longer than learned positions reach."""
        if self.max_length is not None and length > self.max_length:
            raise ValueError(f"learned positions reach {self.max_length} tokens, not {length}")

    def layers(self) -> list[Block]:
        """The blocks, first to last."""
        return [cast(Block, block) for block in self.blocks]


class Embedding(nn.Module):
    """One vector a token, and one a position for the schemes that add one."""

    def __init__(self, config: AnyModel, vocabulary: int, length: int):
        super().__init__()
        self.token = nn.Embedding(vocabulary, config.width)
        nn.init.normal_(self.token.weight, std=config.width**-0.5)
        self.scheme = config.additive_position
        if self.scheme == "learned":
            self.position = nn.Parameter(torch.randn(length, config.width) * config.width**-0.5)

    def forward(self, tokens: Tokens, start: int = 0) -> Hidden:
        """Of tokens whose first one is at position `start`."""
        x, length = self.token(tokens), tokens.shape[1]
        if self.scheme == "learned":
            x = x + self.position[start : start + length]
        elif self.scheme == "sinusoidal":
            # Scaled to the size of a token's vector: unit sines would drown it.
            x = x + sinusoidal(length, x.shape[-1], x, start=start) * (2 / x.shape[-1]) ** 0.5
        return x


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)) where there is an MLP."""

    def __init__(self, config: AnyModel, mixer: ModelConfig, length: int):
        super().__init__()
        self.mixer_norm = build_norm(config)
        self.mixer = build_mixer(mixer, length)
        self.mlp = None
        if config.mlp is not None:
            hidden = config.mlp * config.width
            inner = SwiGLU(config.width, hidden) if config.activation == "swiglu" else nn.Linear(config.width, hidden)
            gelu = [nn.GELU()] if config.activation == "gelu" else []
            self.mlp = nn.Sequential(build_norm(config), inner, *gelu, nn.Linear(hidden, config.width))

    def forward(
        self, x: Float[Tensor, "B _ D"], positions: Positions | None = None, projected: Float[Tensor, "B L P"] | None = None
    ) -> Float[Tensor, "B _ D"]:
        """The block's output at positions `at`.

        `projected` is what `project` makes of every position, where that is known already: `x` is then what stands at `at` alone.
        """
        if projected is None:
            x, projected = gather_positions(x, positions), self.project(x)
        return self.refine(x + self.mixer.mix(projected, positions))

    def step(
        self, x: Float[Tensor, "B _ D"], cache: Cache, projected: Float[Tensor, "B L P"] | None = None, *, last: bool = False
    ) -> tuple[Float[Tensor, "B _ D"], Cache]:
        """The block's output of tokens that follow upon those of `memory`, or of the `last` alone; and the memory of all.

        `projected` is what `project` makes of every token, where that is known already: of `x`, the last row may then do.
        """
        mixed, cache = self.mixer.step(self.project(x) if projected is None else projected, cache, last=last)
        return self.refine((last_tokens(x, 1) if last else x) + mixed), cache

    def refine(self, x: Float[Tensor, "B _ D"]) -> Float[Tensor, "B _ D"]:
        """The second half, of each token alone."""
        return x if self.mlp is None else x + self.mlp(x)

    def project(self, x: Float[Tensor, "*tokens D"]) -> Float[Tensor, "*tokens P"]:
        """What the mixer makes of each token alone."""
        return self.mixer.project(self.mixer_norm(x))


class SwiGLU(nn.Module):
    """swish(x G) * (x U): `hidden` units, each of which another opens (arXiv 2002.05202)."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.gate_and_up = nn.Linear(width, 2 * hidden, bias=False)

    def forward(self, x: Float[Tensor, "*tokens D"]) -> Float[Tensor, "*tokens H"]:
        gate, up = self.gate_and_up(x).chunk(2, dim=-1)
        return F.silu(gate) * up


def build_norm(config: AnyModel) -> nn.LayerNorm | nn.RMSNorm:
    """Over the channels of a token, with learned scales."""
    return nn.RMSNorm(config.width, eps=1e-6) if config.norm == "rms" else nn.LayerNorm(config.width)
