"""CAT as one layer for somebody's own model: the study's mixer, built from plain arguments (arXiv 2407.05591, equation 2)."""

from __future__ import annotations

from typing import Literal, cast

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from cat.config import Count, KernelSize
from cat.mixers.attention.config import AttentionConfig
from cat.mixers.base import Cache
from cat.mixers.build import build_mixer
from cat.mixers.qkv import QKVMixer
from cat.ops.common import autocast_enabled
from cat.types import Hidden


class ConvolutionAugmentedAttention(nn.Module):
    """Causal softmax attention whose queries, keys and values pass through short causal filters first.

    Maps `x` (batch, length, width) to the same shape, for any length; what stands at a position depends on nothing after it,
    but for rounding where long filters are applied by FFT. So tokens that pad a sequence on its right change nothing.
    Each of `q`, `k` and `v` is the number of taps of the filter on that stream, `full` for as many as `length`, or what
    generates them: a `network` or a basis of fixed `decay` or a `state` space of learned ones, of size `filter_size`. None is
    no filter, and without any the layer is the transformer's attention. The filters begin close to the identity.

        width         channels of x
        heads         heads, which divide width
        position      none, or rotary or alibi positions, which are the layer's own; the filters do without
        sharing       one filter a head, one a channel, or one from every head to every head (mixing)
        dilation      how many tokens a tap is from the next; 1: none is skipped
        filter_size   hidden units of a network, or decays
        filter_init   begin close to the identity, or at random
        filter_bias   add a learned vector to what is filtered
        filter_norm   divide every filter by the sum of its absolute taps, a generated one by that of `length` taps
        qk_norm       queries and keys of unit length, with a learned temperature a head
        temperature   a learned temperature a head without that
        length        tokens of a training sequence; only full and generated taps need it
        device, dtype of the weights, as in the modules of torch

    Raises ValueError, in one line that names the argument, where one is wrong or two contradict each other, and where `x` has
    another shape or type. Source: arXiv 2407.05591.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        conv_q: KernelSize | None = None,
        conv_k: KernelSize | None = None,
        conv_v: KernelSize | None = None,
        position: Literal["none", "rotary", "alibi"] = "none",
        sharing: Literal["head", "channel", "mixing"] = "head",
        dilation: int = 1,
        filter_size: int | None = None,
        filter_init: Literal["identity", "random"] = "identity",
        filter_bias: bool = False,
        filter_norm: bool = False,
        qk_norm: bool = False,
        temperature: bool = False,
        length: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        try:
            config = _Arguments(
                mixer="attention",
                layers=1,
                width=width,
                heads=heads,
                conv_q=conv_q,
                conv_k=conv_k,
                conv_v=conv_v,
                position=position,
                sharing=sharing,
                dilation=dilation,
                filter_size=filter_size,
                filter_init=filter_init,
                filter_bias=filter_bias,
                filter_norm=filter_norm,
                qk_norm=qk_norm,
                temperature=temperature,
                length=length,
            )
        except ValidationError as error:
            raise ValueError(_in_words(error)) from None
        for stream, taps in config.kernel_sizes.items():
            if isinstance(taps, str) and length is None:
                raise ValueError(f"{stream} = {taps} needs length, the tokens of a training sequence")
        if length is not None:
            config.check_length(length)
        self.width = width
        self.mixer = cast(QKVMixer, build_mixer(config, 1 if length is None else length)).to(device, dtype)

    def forward(self, x: Hidden) -> Hidden:
        self._check(x)
        return self.mixer(x)

    def step(self, x: Hidden, cache: Cache | None = None) -> tuple[Hidden, Cache]:
        """What `forward` makes of tokens that follow upon those of `memory`, and the memory of all of them.

        For generation, where a sequence comes token by token or part by part; None before the first one. Keys, values and what
        the filters see next are kept, so that no token is read twice. Raises ValueError where `x` has another shape or type.
        """
        self._check(x)
        return self.mixer.step(self.mixer.project(x), cache or Cache())

    def _check(self, x: Tensor) -> None:
        if x.ndim != 3 or x.shape[1] == 0 or x.shape[2] != self.width:
            raise ValueError(f"x has shape {tuple(x.shape)}, not (batch, length, {self.width}) with at least one token")
        own = self.mixer.projection.weight.dtype
        if x.dtype != own and not (autocast_enabled(x) and x.is_floating_point() and torch.float64 not in (own, x.dtype)):
            raise ValueError(f"x is of {x.dtype}, the layer of {own}: x.to({own}), or the layer to that of x")


class _Arguments(AttentionConfig):
    """What a layer can be told: learned and sinusoidal positions are added to an embedding, which a layer has not."""

    position: Literal["none", "rotary", "alibi"]
    length: Count | None = None


def _in_words(error: ValidationError) -> str:
    """What is wrong first, in one line."""
    first, *others = error.errors()
    if not first["loc"]:
        return first["msg"].removeprefix("Value error, ")
    # A value that can be of several types is told of each of them.
    about_it = [first, *(other for other in others if other["loc"][0] == first["loc"][0])]
    wanted = " or ".join(part["msg"].removeprefix("Input should be ") for part in about_it)
    shown = " ".join(repr(first["input"]).split())
    return f"{first['loc'][0]} = {shown} should be {wanted}"
