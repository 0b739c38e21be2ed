"""A sequence model: embedding, `layers` pre-norm residual blocks, final norm, output head.

    x = E[tokens] (+ position)    x = x + mixer(norm(x))    x = x + mlp(norm(x))    logits = norm(x) W

A block without an MLP has only the mixer. With `canon`, a block has further convolutions: see cat/mixers/canon.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from cat.config import MixerConfig, ModelConfig
from cat.mixers.base import Cache, last_tokens
from cat.mixers.build import build_mixer
from cat.mixers.canon import Canon
from cat.mixers.packing import Packing, align_prompts, pack
from cat.mixers.qkv import QKVMixer
from cat.ops.common import is_mapped, reset_parameters, set_values
from cat.ops.linear import has_hooks
from cat.ops.position import gather_positions, sinusoidal
from cat.types import Hidden, Positions, Tokens

MIN_DISTINCT = 1024
"""Fewest tokens of a batch for which finding the distinct ones pays off."""
Convolve = Callable[[str, Hidden], Hidden]
"""Apply the Canon layer at a place, given by its letter, if there is one."""


class SequenceModel(nn.Module):
    """A causal model over `vocabulary` tokens, trained on sequences of `length` tokens.

    Raises ValueError if `config` cannot be trained at `length`.
    """

    def __init__(self, config: ModelConfig, *, vocabulary: int, length: int):
        super().__init__()
        config.check_length(length)
        self.config, self.length = config, length
        self.max_length = config.max_length(length)
        self.embedding = Embedding(config, vocabulary, length)
        self.blocks = nn.ModuleList(Block(config, mixer, length) for mixer in config.layer_mixers)
        self.norm = build_norm(config)
        self.head = Head(config.width, vocabulary, bias=False)
        if config.tied:
            self.head.weight = self.embedding.token.weight

    def reset_parameters(self) -> None:
        """Initialize all parameters and buffers again."""
        for part in self.children():
            reset_parameters(part)

    def forward(
        self, tokens: Tokens, attention_mask: Tensor | None = None, segment_ids: Tensor | None = None
    ) -> Float[Tensor, "B L V"]:
        """Return the logits of the next token at every position.

        `attention_mask` (B, L) is 1 or True at tokens, and 0 or False at padding on the left or on the right. `segment_ids`
        (B, L) are integers: consecutive tokens of a row with the same id are one document, and documents do not see each other.
        With either, logits and gradients equal those of separate sequences. Logits at padding are zero, and its tokens may be any
        integers. Positions start at each document.

        Raises ValueError if a mask has the wrong shape, dtype or values, or if both are given.
        """
        return self.head(self.hidden(tokens, attention_mask=attention_mask, segment_ids=segment_ids))

    def logits_at(
        self,
        tokens: Tokens,
        positions: Positions,
        attention_mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
    ) -> Float[Tensor, "B A V"]:
        """Return the logits at `positions` only; masks as in `forward`.

        Positions of one sequence must differ. The last block is computed only at `positions`: in a recall task most positions
        have no target.
        """
        positions_or_all = None if positions.shape == tokens.shape else positions
        return self.head(self.hidden(tokens, positions_or_all, attention_mask=attention_mask, segment_ids=segment_ids))

    def hidden(
        self,
        tokens: Tokens,
        positions: Positions | None = None,
        *,
        attention_mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
    ) -> Float[Tensor, "B _ D"]:
        """Return the input of the head at `positions`, or at every position; masks as in `forward`.

        Raises ValueError if a sequence is longer than the learned positions.
        """
        packing = pack(tokens, attention_mask, segment_ids)
        tokens = tokens if packing is None else packing.clear(tokens)
        self.check_length(tokens.shape[1] if packing is None else packing.longest)
        first, *others = self.layers()
        first_positions = None if others else positions
        rows, table = self.embedding_table(tokens)
        projected = None if table is None else F.embedding(rows, first.project(table))
        every = projected is None or first_positions is None or first.mlp_convolves
        looked_up = rows if every else rows.gather(1, cast(Tensor, first_positions))
        x = self.embedding(looked_up, positions=None if packing is None else packing.positions, table=table)
        x = first(x, first_positions, projected, packing)
        for block in others:
            x = block(x, positions if block is others[-1] else None, packing=packing)
        x = self.norm(x)
        return x if packing is None else packing.clear_at(x, positions)

    def embedding_table(self, tokens: Tokens) -> tuple[Int[Tensor, "B L"], Float[Tensor, "N D"] | None]:
        """Return the row of each token in a table of embeddings: the first block then projects each row once, not each token.

        The table has the whole vocabulary, or on a CPU only the distinct tokens of a batch. None, with the tokens themselves, if
        the batch has too few tokens for a table to pay off, if positions are added to the embedding or tokens are convolved
        before, because the projection then depends on more than the token, and if the block has hooks, which only a call of the
        whole block runs.
        """
        first, weight = self.layers()[0], self.embedding.token.weight
        if self.embedding.scheme != "none" or "A" in first.canon or has_hooks(first):
            return tokens, None
        if tokens.numel() > len(weight):
            return tokens, weight
        # A GPU would wait for the number of distinct tokens, and neither compiled nor mapped code can depend on it.
        if torch.compiler.is_compiling() or tokens.device.type != "cpu" or tokens.numel() < MIN_DISTINCT or is_mapped(tokens):
            return tokens, None
        occurs = torch.zeros(len(weight), dtype=torch.bool).scatter_(0, tokens.flatten(), True)
        distinct = occurs.nonzero()[:, 0]
        if 2 * len(distinct) > tokens.numel():
            return tokens, None
        return occurs.cumsum(0)[tokens] - 1, self.embedding.token(distinct)

    def step(
        self, tokens: Tokens, caches: Sequence[Cache] = (), attention_mask: Tensor | None = None
    ) -> tuple[Float[Tensor, "B V"], list[Cache]]:
        """Return the logits of the token after `tokens`, and the updated caches.

        `tokens` continue the sequence of `caches`: one cache per block, or none at the start of a sequence. The logits are those
        of `forward` at the last position of the whole sequence. For beam search, `Cache.reorder` each cache.

        `attention_mask` (B, L) is for prompts of unequal length, with padding on the left or on the right: it is 1 or True at
        tokens. Only a prompt has it, so it needs empty caches. Later steps continue each prompt.

        Raises ValueError if a sequence is longer than the learned positions, if the mask has the wrong shape, dtype or values, if
        it has no token in a row, or if it is given with caches.
        """
        x, caches = self.hidden_step(tokens, caches, attention_mask, last=True)
        return self.head(x[:, 0]), caches

    def hidden_step(
        self, tokens: Tokens, caches: Sequence[Cache] = (), attention_mask: Tensor | None = None, *, last: bool = False
    ) -> tuple[Float[Tensor, "B _ D"], list[Cache]]:
        """Return the inputs of the head for `tokens`, and the updated caches: as `step`, but for every token.

        With `last`, only for the last token of each sequence.
        """
        caches = caches or [Cache()] * len(self.blocks)
        prompts = None if attention_mask is None else align_prompts(tokens, attention_mask, caches[0].length)
        if prompts is not None:
            tokens, caches = prompts.align(tokens), [Cache(padding=prompts.padding)] * len(self.blocks)
        start, positions = caches[0].length, caches[0].positions(tokens.shape[1])
        if self.max_length is not None:
            self.check_length(start + tokens.shape[1] if positions is None else 1 + int(positions.max()))
        new_caches: list[Cache] = []
        blocks = self.layers()
        rows, table = self.embedding_table(tokens)
        projected = None if table is None else F.embedding(rows, blocks[0].project(table))
        only_last = last and projected is not None and len(blocks) == 1 and not blocks[0].mlp_convolves
        looked_up = rows[:, -1:] if only_last else rows
        x = self.embedding(looked_up, start, None if positions is None else positions.clamp(min=0), table=table)
        for block, cache in zip(blocks, caches, strict=True):
            x, cache = block.step(x, cache, projected if block is blocks[0] else None, last=last and block is blocks[-1])
            new_caches.append(cache)
        x = self.norm(x)
        return x if last or prompts is None else prompts.restore(x), new_caches

    def check_length(self, length: int) -> None:
        """Raise ValueError if a sequence of `length` tokens is longer than the learned positions."""
        if self.max_length is not None and length > self.max_length:
            raise ValueError(f"learned positions reach {self.max_length} tokens, not {length}")

    def layers(self) -> list[Block]:
        return [cast(Block, block) for block in self.blocks]


class Embedding(nn.Module):
    """One vector per token, plus one per position for learned and sinusoidal positions."""

    def __init__(self, config: ModelConfig, vocabulary: int, length: int):
        super().__init__()
        self.token = TokenEmbedding(vocabulary, config.width)
        self.scheme = config.position
        self.position = nn.Parameter(torch.empty(length, config.width)) if self.scheme == "learned" else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize the learned positions."""
        if self.position is not None:
            set_values(self.position, torch.randn(self.position.shape) * self.position.shape[1] ** -0.5)

    def forward(
        self,
        tokens: Tokens,
        start: int = 0,
        positions: Int[Tensor, "B _"] | None = None,
        *,
        table: Float[Tensor, "N D"] | None = None,
    ) -> Hidden:
        """Embed tokens; the first one is at position `start`, or each at its own of `positions`.

        With a `table`, `tokens` are rows of it.
        """
        length = tokens.shape[1]
        # The call of the module runs its hooks.
        x = self.token(tokens) if table is None or table is self.token.weight else F.embedding(tokens, table)
        if self.position is not None:
            x = x + (self.position[start : start + length] if positions is None else F.embedding(positions, self.position))
        elif self.scheme == "sinusoidal":
            # Scaled to the norm of a token's vector: sines of amplitude 1 would dominate it.
            x = x + sinusoidal(length, x.shape[-1], x, start=start, positions=positions) * (2 / x.shape[-1]) ** 0.5
        return x


class TokenEmbedding(nn.Embedding):
    """One vector per token."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.embedding_dim**-0.5)


class Head(nn.Linear):
    """Map the residual stream to the logits of the next token."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.in_features**-0.5)


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)) if the model has an MLP."""

    def __init__(self, config: ModelConfig, mixer: MixerConfig, length: int):
        super().__init__()
        self.mixer_norm = build_norm(config)
        self.mixer = build_mixer(mixer, width=config.width, length=length)
        self.mlp = None if config.mlp is None else MLP(config, config.mlp * config.width)
        self.mlp_convolves = config.canon_in_mlp
        self.canon = nn.ModuleDict()
        widths = {"A": config.width, "C": config.width, "D": 0 if self.mlp is None else self.mlp.inner_width}
        for place in config.canon or "":
            if place == "B":
                qkv = cast(QKVMixer, self.mixer)
                qkv.canon = Canon(sum(qkv.widths.values()), config.canon_size)
            else:
                self.canon[place] = Canon(widths[place], config.canon_size)

    def forward(
        self,
        x: Float[Tensor, "B _ D"],
        positions: Positions | None = None,
        projected: Float[Tensor, "B L P"] | None = None,
        packing: Packing | None = None,
    ) -> Float[Tensor, "B _ D"]:
        """Return the output at `positions`, or at every position.

        `projected` is the result of `project` at every position, if already computed. `x` then holds only the tokens at
        `positions`, or every token if the MLP convolves. `packing` has the documents of the batch.
        """
        mixed, refined = (None, positions) if self.mlp_convolves else (positions, None)

        def convolve(place: str, x: Hidden) -> Hidden:
            if packing is None or place not in self.canon:
                return self._convolve(place, x)
            return packing.mix(lambda x, _: self._convolve(place, x), x)

        if projected is None:
            x, projected = gather_positions(x, mixed), self.project(x, convolve)
        mix = self.mixer.mix
        x = x + (mix(projected, mixed) if packing is None else packing.mix(mix, projected, mixed))
        return gather_positions(self.refine(x, convolve), refined)

    def step(
        self, x: Float[Tensor, "B _ D"], cache: Cache, projected: Float[Tensor, "B L P"] | None = None, *, last: bool = False
    ) -> tuple[Float[Tensor, "B _ D"], Cache]:
        """Return the output for tokens that continue `cache`, and the updated cache.

        With `last`, only the output of the last token is computed. `projected` is the result of `project` for every token, if
        already computed. With both, `x` may hold only the last token, unless the MLP convolves.
        """
        inputs: dict[str, Tensor] = {}

        def convolve(place: str, x: Hidden) -> Hidden:
            if place not in self.canon:
                return x
            padding, name = cache.new_padding(x.shape[1]), f"canon_{place}"
            x = x if padding is None else x.masked_fill(padding[..., None], 0)
            y, inputs[name] = cast(Canon, self.canon[place]).step(x, cache.state.get(name))
            return y

        projected = self.project(x, convolve) if projected is None else projected
        only_last = last and not self.mlp_convolves
        mixed, after = self.mixer.step_padded(projected, cache, last=only_last)
        y = self.refine((last_tokens(x, 1) if only_last else x) + mixed, convolve)
        after = replace(after, state={**after.state, **inputs}) if inputs else after
        return last_tokens(y, 1) if last else y, after

    def refine(self, x: Float[Tensor, "B _ D"], convolve: Convolve | None = None) -> Float[Tensor, "B _ D"]:
        """Apply the MLP half of the block; `convolve` applies Canon layers, by default to sequences without a cache."""
        return x if self.mlp is None else x + self.mlp(x, convolve or self._convolve)

    def project(self, x: Float[Tensor, "*tokens D"], convolve: Convolve | None = None) -> Float[Tensor, "*tokens P"]:
        """Apply the norm, Canon-A if the model has it, and the per-token part of the mixer; `convolve` as in `refine`."""
        return self.mixer.project((convolve or self._convolve)("A", self.mixer_norm(x)))

    def _convolve(self, place: str, x: Float[Tensor, "*tokens C"]) -> Float[Tensor, "*tokens C"]:
        """Apply the Canon layer at a place, if there is one, to whole sequences."""
        return cast(Hidden, self.canon[place](x)) if place in self.canon else x


class MLP(nn.Sequential):
    """Norm, linear map to `hidden` units, activation, linear map back. `hidden` units of SwiGLU have a gate each."""

    def __init__(self, config: ModelConfig, hidden: int):
        inner = SwiGLU(config.width, hidden) if config.activation == "swiglu" else nn.Linear(config.width, hidden)
        activations = {"gelu": nn.GELU, "relu2": SquaredReLU}
        activation: list[nn.Module] = [activations[config.activation]()] if config.activation in activations else []
        super().__init__(build_norm(config), inner, *activation, nn.Linear(hidden, config.width))
        self.inner_width = 2 * hidden if config.activation == "swiglu" else hidden

    def forward(self, x: Float[Tensor, "B _ D"], convolve: Convolve) -> Float[Tensor, "B _ D"]:  # type: ignore[override]
        """Return the output. `convolve` applies the Canon layers at C, before the first map, and at D, before the activation."""
        norm, inner, *activation, out = self
        x = convolve("C", norm(x))
        x = activation[0](convolve("D", inner(x))) if activation else inner(x, convolve)
        return cast(Hidden, out(x))


class SwiGLU(nn.Module):
    """swish(x G) * (x U) with `hidden` gated units (arXiv 2002.05202)."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.gate_and_up = nn.Linear(width, 2 * hidden, bias=False)

    def forward(self, x: Float[Tensor, "B _ D"], convolve: Convolve) -> Float[Tensor, "B _ H"]:
        gate, up = convolve("D", self.gate_and_up(x)).chunk(2, dim=-1)
        return F.silu(gate) * up


class SquaredReLU(nn.Module):
    """max(x, 0)^2 (arXiv 2109.08668)."""

    def forward(self, x: Float[Tensor, "*tokens H"]) -> Float[Tensor, "*tokens H"]:
        return F.relu(x).square()


def build_norm(config: ModelConfig) -> nn.LayerNorm | nn.RMSNorm:
    """Build the model's norm: LayerNorm, or RMSNorm with epsilon 1e-6."""
    return nn.RMSNorm(config.width, eps=1e-6) if config.norm == "rms" else nn.LayerNorm(config.width)
