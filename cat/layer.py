"""CAT attention as a layer for your own model (arXiv 2407.05591, equation 2).

The layer is the study's mixer with plain arguments.
"""

from __future__ import annotations

from typing import Literal, cast

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from cat.config import Config, Count, FilterInit, KernelSize
from cat.mixers.attention.config import AttentionConfig
from cat.mixers.base import Cache
from cat.mixers.build import build_mixer
from cat.mixers.packing import align_prompts
from cat.mixers.qkv import QKVMixer
from cat.ops.common import autocast_enabled, reset_parameters
from cat.ops.linear import is_plain
from cat.types import Hidden


class ConvolutionAugmentedAttention(nn.Module):
    """Causal softmax attention with short convolutions on q, k and v.

    Maps `x` (batch, length, width) to the same shape, for any length. An output depends only on its own and earlier positions,
    except for rounding if long kernels are applied by FFT. Padding on the right therefore does not change other positions. This
    holds for finite numbers only: a NaN or an infinity at one position can reach earlier outputs, since 0 times NaN is NaN. With
    an `attention_mask`, padding may have any values.
    There is no `is_causal=False`: convolutions, cache and positions all use the past only, and an encoder would need other ones.

        width                    channels of x
        heads                    attention heads; must divide width
        conv_q, conv_k, conv_v   kernel size of the convolution on queries, keys and values; `full` for `length`; or the generator
                                 of a kernel of any length: a `network`, fixed exponentials (`decay`) or a `state` space of
                                 learned ones; None: no convolution. Without any, the layer is the transformer's attention
        kv_heads                 heads of keys and values, which consecutive query heads share (grouped queries); must divide
                                 heads; None: as many as heads
        bias                     add a learned bias to the projections to q, k, v and the output
        position                 none, rotary or alibi; the convolutions need no positions
        rope_base                base of the frequencies of rotary positions
        rope_scale               divide rotary positions by this number (linear position interpolation, arXiv 2306.15595)
        window                   tokens that a query sees, its own included; None: all
        dropout                  probability that an attention weight is dropped; only in training mode
        sharing                  one kernel per head, one per channel, or one per pair of input and output heads (mixing)
        dilation                 tokens between consecutive kernel values; 1: no token is skipped
        filter_size              hidden units of a `network` kernel, or number of decays
        token_shift              project m x_t + (1 - m) x_{t-1} with learned m, per channel and projection, as RWKV does
        residual                 add the input of each convolution to its output
        filter_init              initialize convolutions close to the `identity`, or kernels at `random`, uniformly as nn.Conv1d
                                 (`uniform`), as in KV shifting (`shift`, kernels of size 2), or as in Primer (`primer`)
        filter_bias              add a learned bias to the convolution output
        filter_norm              divide every kernel by the sum of its absolute values; if generated, the sum over `length`
        qk_norm                  scale queries and keys to unit length, and learn one temperature per head
        temperature              learn one temperature per head without qk_norm
        length                   training length in tokens; required only for `full` and generated kernels
        device, dtype            of the weights, as for torch modules

    Raises ValueError with one line that names the argument if an argument is invalid, if two arguments contradict each other, or
    if `x` has the wrong shape or dtype. Source: arXiv 2407.05591.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        conv_q: KernelSize | None = None,
        conv_k: KernelSize | None = None,
        conv_v: KernelSize | None = None,
        kv_heads: int | None = None,
        bias: bool = False,
        position: Literal["none", "rotary", "alibi"] = "none",
        rope_base: float = 10_000.0,
        rope_scale: float = 1.0,
        window: int | None = None,
        dropout: float = 0.0,
        sharing: Literal["head", "channel", "mixing"] = "head",
        dilation: int = 1,
        filter_size: int | None = None,
        token_shift: bool = False,
        residual: bool = False,
        filter_init: FilterInit = "identity",
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
            config = AttentionConfig(
                heads=heads,
                conv_q=conv_q,
                conv_k=conv_k,
                conv_v=conv_v,
                kv_heads=kv_heads,
                bias=bias,
                position=position,
                rope_base=rope_base,
                rope_scale=rope_scale,
                window=window,
                dropout=dropout,
                sharing=sharing,
                dilation=dilation,
                filter_size=filter_size,
                token_shift=token_shift,
                residual=residual,
                filter_init=filter_init,
                filter_bias=filter_bias,
                filter_norm=filter_norm,
                qk_norm=qk_norm,
                temperature=temperature,
            )
            sizes = _Sizes(width=width, length=length)
        except ValidationError as error:
            raise ValueError(_first_problem(error)) from None
        config.check_width(sizes.width)
        for projection, kernel_size in config.kernel_sizes.items():
            if isinstance(kernel_size, str) and length is None:
                raise ValueError(f"conv_{projection} = {kernel_size} needs length, the training length in tokens")
        if length is not None:
            config.check_length(length)
        self.width = width
        self.mixer = cast(QKVMixer, build_mixer(config, width=width, length=1 if length is None else length)).to(device, dtype)

    def forward(self, x: Hidden, attention_mask: Tensor | None = None, segment_ids: Tensor | None = None) -> Hidden:
        """Return the outputs.

        `attention_mask` (batch, length) is 1 or True at tokens, and 0 or False at padding on the left or on the right.
        `segment_ids` (batch, length) are integers: consecutive tokens of a row with the same id are one document, and documents
        do not see each other. With either, outputs and gradients equal those of separate sequences. At padding they are zero,
        even if `x` is not finite there.

        Raises ValueError if `x` or a mask has the wrong shape or dtype, if a mask has wrong values, or if both are given.
        """
        self._check(x)
        return self.mixer(x, attention_mask=attention_mask, segment_ids=segment_ids)

    def step(self, x: Hidden, cache: Cache | None = None, attention_mask: Tensor | None = None) -> tuple[Hidden, Cache]:
        """Return the outputs for the tokens after those in `cache`, and the new cache.

        The outputs equal those of `forward` on the whole sequence. For generation, one token or several at a time; `cache` is
        None before the first token. The cache has the keys, the values and the inputs that the convolutions need next. The first
        axis of its tensors is the batch; for beam search, `cache.reorder(indices)` selects the sequences to continue.

        `attention_mask` (batch, length) is for prompts of unequal length, with padding on the left or on the right: it is 1 or
        True at tokens. Outputs at padding are zero. Later steps continue each prompt and have no padding.

        Raises ValueError if `x` or the mask has the wrong shape or dtype, or if the mask is given with a cache that has tokens.
        """
        self._check(x)
        cache = cache or Cache()
        prompts = None if attention_mask is None else align_prompts(x, attention_mask, cache.length)
        if prompts is None:
            return self.mixer.step_padded(self.mixer.project(x), cache)
        y, cache = self.mixer.step_padded(self.mixer.project(prompts.align(x)), Cache(padding=prompts.padding))
        return prompts.restore(y), cache

    def reset_parameters(self) -> None:
        """Initialize all parameters and buffers again."""
        reset_parameters(self.mixer)

    def _check(self, x: Tensor) -> None:
        if x.ndim != 3 or x.shape[1] == 0 or x.shape[2] != self.width:
            raise ValueError(f"x has shape {tuple(x.shape)}, not (batch, length, {self.width}) with at least one token")
        if not is_plain(self.mixer.q_proj):
            return  # wrapped and quantized layers check their own dtypes
        dtype = self.mixer.q_proj.weight.dtype
        if x.dtype != dtype and not (autocast_enabled(x) and x.is_floating_point() and torch.float64 not in (dtype, x.dtype)):
            raise ValueError(f"x has dtype {x.dtype}, the layer {dtype}. Fix: x.to({dtype}) or layer.to({x.dtype})")


class _Sizes(Config):
    """Arguments of the layer that are not settings of its mixer."""

    width: Count
    length: Count | None = None


def _first_problem(error: ValidationError) -> str:
    """Return the first problem in one line."""
    first, *others = error.errors()
    if not first["loc"]:
        return first["msg"].removeprefix("Value error, ")
    # pydantic reports one error for each type that a value could have.
    same_argument = [first, *(other for other in others if other["loc"][0] == first["loc"][0])]
    expected = " or ".join(part["msg"].removeprefix("Input should be ") for part in same_argument)
    value = " ".join(repr(first["input"]).split())
    return f"{first['loc'][0]} = {value} should be {expected}"
