"""CAT in a Hugging Face model that exists: causal convolutions behind its projections to q, k and v, before rotary positions.

    model = LlamaForCausalLM.from_pretrained("folder of the original")
    cat.convert(model, conv_k=4)               # every kernel is the identity: all outputs are unchanged to the bit
    ...                                        # train
    model.save_pretrained("folder")            # the kernels are conv_q, conv_k and conv_v of every attention module
    model = cat.load_converted(LlamaForCausalLM, "folder")

The module works on the modules that it finds and does not import transformers. Hooks of the attention module convolve the outputs
of the projections. The inputs that a convolution needs of earlier tokens are in the cache of the call, one set per layer.
"""

import functools
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from cat.config import Count
from cat.ops.conv.direct import filter_direct
from cat.types import Heads

Sharing = Literal["head", "channel"]
Output = Float[Tensor, "B L P"]
"""Output of a projection: the channels of all heads; with q, k and v of each head in turn if they have one projection."""
Inputs = Float[Tensor, "B H R C"]
"""Inputs of a convolution at the R tokens before those of the call, oldest first."""
TokenMask = Bool[Tensor, "#B L"]

SEPARATE = {"q_proj": ("q",), "k_proj": ("k",), "v_proj": ("v",)}
"""Projections of Llama, Mistral and Qwen, each with its output."""
FUSED = {"query_key_value": ("q", "k", "v")}
"""The projection of GPT-NeoX. Its output has q, k and v of the first head, then of the second, and so on."""
SETTINGS = "cat_convert"
"""Key of the arguments of `convert` in the model's configuration."""
CROPPABLE = 128
"""Maximum number of tokens to crop from a cache: it keeps the inputs of this many tokens beyond the reach of the convolution.

Assisted generation crops the tokens that the model does not accept, about 20 at most.
"""


def convert(
    model: nn.Module,
    *,
    conv_q: int | None = None,
    conv_k: int | None = None,
    conv_v: int | None = None,
    sharing: Sharing = "head",
    dilation: int = 1,
) -> nn.Module:
    """Put causal convolutions behind the projections of `model`, and return it.

    `model` is a causal Hugging Face model with the attention of Llama (`q_proj`, `k_proj`, `v_proj`) or GPT-NeoX
    (`query_key_value`), of transformers 5 or later. It is changed in place. Every kernel starts as the identity, so its outputs
    stay the same to the bit until it is trained.

        conv_q, conv_k, conv_v   kernel size of the convolution on queries, keys and values; None: no convolution
        sharing                  one kernel per head, or one per channel
        dilation                 tokens between consecutive kernel values; 1: no token is skipped

    Padding is no input of a convolution: `attention_mask` works on both sides. Documents packed into one sequence are convolved
    across their borders. Generation needs a dynamic cache, the default of `generate`. The arguments are also in `model.config`,
    which `save_pretrained` writes and `load_converted` reads.

    Raises ValueError with one line if an argument is invalid or has no effect, if `model` has no such attention, or if it is
    already converted.
    """
    sizes = {"q": conv_q, "k": conv_k, "v": conv_v}
    _check_arguments(sizes, sharing, dilation)
    attentions = list(_attentions(model))
    for attention in attentions:
        for name, kernel_size in sizes.items():
            if kernel_size is not None:
                shape = attention.heads(name), attention.channels, kernel_size
                convolution = CausalConvolution(*shape, sharing=sharing, dilation=dilation, like=attention.weight)
                attention.module.add_module(f"conv_{name}", convolution)
        _Hooks(attention)
    settings = {**{f"conv_{name}": size for name, size in sizes.items()}, "sharing": sharing, "dilation": dilation}
    setattr(model.config, SETTINGS, settings)
    return model


def load_converted(model_class: Any, folder: Any, **options: Any) -> nn.Module:
    """Load a converted model that `save_pretrained` wrote to `folder`.

    `model_class` is the class of the model, such as `LlamaForCausalLM`. `folder` and `options` are those of its
    `from_pretrained`. Raises ValueError if `model_class` is an Auto class, or if the saved model was not converted.
    """
    if not hasattr(model_class, "base_model_prefix"):
        raise ValueError(f"model_class = {model_class.__name__} is no class of a model. Fix: use that of the saved model")

    def build(self: nn.Module, config: Any, *args: Any, **kwargs: Any) -> None:
        model_class.__init__(self, config, *args, **kwargs)
        if (settings := getattr(config, SETTINGS, None)) is None:
            raise ValueError(f"{folder}: config.json has no {SETTINGS}, so the model was not converted before it was saved")
        convert(self, **settings)

    # The class loads the weights, so it needs the convolutions first.
    builder: Any = type(model_class.__name__, (model_class,), {"__init__": build, "__module__": model_class.__module__})
    model, report = builder.from_pretrained(folder, output_loading_info=True, **options)
    if missing := sorted(key for key in report["missing_keys"] if ".conv_" in key):
        raise ValueError(f"{folder} has no weights for {missing[0]}")
    model.__class__ = model_class
    return model


class CausalConvolution(nn.Module):
    """Causal convolution of the heads of a projection with one kernel per head or per channel.

    Maps `x` (B, H, L, C) to the same shape. Kernels start as the identity. `earlier` are the inputs before `x`; None: `x` begins
    the sequence.
    """

    def __init__(self, heads: int, channels: int, kernel_size: int, *, sharing: Sharing, dilation: int, like: Tensor):
        super().__init__()
        shape = (heads, kernel_size) if sharing == "head" else (heads, channels, kernel_size)
        dtype = like.dtype if like.is_floating_point() else torch.float32  # the weights may be quantized
        self.kernel = nn.Parameter(torch.empty(shape, dtype=dtype, device=like.device))
        self.dilation = dilation
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.kernel.zero_()
        self.kernel[..., 0] = 1

    @property
    def reach(self) -> int:
        """Number of earlier tokens that an output depends on."""
        return (self.kernel.shape[-1] - 1) * self.dilation

    def forward(self, x: Heads, earlier: Inputs | None = None) -> Heads:
        kernel = self.kernel.to(x.dtype)
        inputs = x if earlier is None else torch.cat([earlier, x], dim=2)
        # The other algorithms are matrix products and FFTs. They may round, which would change outputs before training.
        outputs = filter_direct(inputs, kernel[:, None] if kernel.ndim == 2 else kernel, self.dilation)
        return outputs[:, :, inputs.shape[2] - x.shape[2] :]

    def extra_repr(self) -> str:
        sharing = "head" if self.kernel.ndim == 2 else "channel"
        return f"kernel_size={self.kernel.shape[-1]}, dilation={self.dilation}, sharing={sharing}"


class _Attention(NamedTuple):
    """An attention module of a model."""

    module: Any
    projections: Mapping[str, tuple[str, ...]]
    channels: int
    """Channels per head."""

    def heads(self, name: str) -> int:
        config = self.module.config
        return config.num_attention_heads if name == "q" else getattr(config, "num_key_value_heads", config.num_attention_heads)

    @property
    def weight(self) -> Tensor:
        return next(getattr(self.module, next(iter(self.projections))).parameters())


class _Hooks:
    """Hooks of one attention module, which convolve the outputs of its projections.

    `begin` finds the cache and the padding in the arguments of the module, for the projections that it calls next.
    """

    def __init__(self, attention: _Attention):
        self.module, self.channels = attention.module, attention.channels
        self.projections = {
            projection: names
            for projection, names in attention.projections.items()
            if any(hasattr(attention.module, f"conv_{name}") for name in names)
        }
        self.hooked: dict[str, tuple[nn.Module, Any]] = {}
        self.layer: Any = None
        self.is_token: TokenMask | None = None
        self.module.register_forward_pre_hook(self.begin, with_kwargs=True)
        self.module.register_forward_hook(self.end)
        self.follow_projections()

    def follow_projections(self) -> None:
        """Hook the projections. LoRA and quantization replace a projection; then its hook moves to the new one."""
        for attribute, names in self.projections.items():
            projection = getattr(self.module, attribute)
            hooked, handle = self.hooked.get(attribute, (None, None))
            if projection is not hooked:
                if handle is not None:
                    handle.remove()
                handle = projection.register_forward_hook(functools.partial(self.convolve_output, names))
                self.hooked[attribute] = projection, handle

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.follow_projections()
        hidden = args[0] if args else kwargs["hidden_states"]
        self.is_token = _token_mask(kwargs.get("attention_mask"), hidden.shape[1])
        # The argument has had four names. Only a cache can be reordered.
        caches = [value for value in (*args, *kwargs.values()) if hasattr(value, "reorder_cache")]
        self.layer = _layer_with_inputs(caches[0], self.module.layer_idx) if caches else None

    def end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.layer = self.is_token = None

    def convolve_output(self, names: tuple[str, ...], projection: nn.Module, args: tuple[Any, ...], output: Output) -> Output:
        heads = output.unflatten(2, (-1, len(names) * self.channels)).transpose(1, 2)
        parts = [self.convolve(name, part) for name, part in zip(names, heads.chunk(len(names), dim=3), strict=True)]
        return (torch.cat(parts, dim=3) if len(parts) > 1 else parts[0]).transpose(1, 2).flatten(2)

    def convolve(self, name: str, x: Heads) -> Heads:
        convolution = getattr(self.module, f"conv_{name}", None)
        if convolution is None:
            return x
        if self.is_token is None:
            return self.convolve_tokens(name, convolution, x)
        is_token = self.is_token[:, None, :, None]
        # At padding, return the input: no token attends to it.
        return torch.where(is_token, self.convolve_tokens(name, convolution, x.masked_fill(~is_token, 0)), x)

    def convolve_tokens(self, name: str, convolution: Any, x: Heads) -> Heads:
        if self.layer is None:
            return convolution(x)
        reach = self.layer.reaches[name] = convolution.reach
        earlier = self.layer.inputs.get(name, x[:, :, :0])
        y = convolution(x, _last(earlier, reach))
        # A copy, because a view would keep the whole prompt in memory.
        self.layer.inputs[name] = _last(torch.cat([earlier, x], dim=2), reach + CROPPABLE).clone()
        return y


class _InputsOfConvolutions:
    """What a layer of a cache gets in addition to keys and values: the last inputs of its convolutions."""

    _layer_type = None  # transformers registers subclasses that name the type of layers they are for
    inputs: dict[str, Inputs]
    reaches: dict[str, int]

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        self.inputs = {}

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self.inputs = {name: x.index_select(0, beam_idx.to(x.device)) for name, x in self.inputs.items()}

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self.inputs = {name: x.repeat_interleave(repeats, dim=0) for name, x in self.inputs.items()}

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self.inputs = {name: x[indices] for name, x in self.inputs.items()}

    def crop(self, tokens: int) -> None:
        length = self.get_seq_length()  # type: ignore[attr-defined]
        super().crop(tokens)  # type: ignore[misc]
        cropped = self.get_seq_length()  # type: ignore[attr-defined]
        for name, x in self.inputs.items():
            kept = x.shape[2] - (length - cropped)
            if kept < min(self.reaches[name], cropped):
                raise ValueError(
                    f"the cache of a converted model cannot be cropped by {length - cropped} tokens, only by {CROPPABLE}"
                )
            self.inputs[name] = x[:, :, : max(0, kept)]


def _layer_with_inputs(cache: Any, index: int) -> Any:
    """Return a layer of the cache. It is also a `_InputsOfConvolutions`."""
    if not hasattr(cache, "layers"):
        raise ValueError(f"the cache {type(cache).__name__} has no layers. Fix: use a DynamicCache of transformers 5 or later")
    while len(cache.layers) <= index and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    layer = cache.layers[index]
    if isinstance(layer, _InputsOfConvolutions):
        return layer
    if layer.is_compileable:
        raise ValueError(f"a converted model cannot use a cache of {type(layer).__name__}. Fix: use a DynamicCache")
    if length := layer.get_seq_length():
        raise ValueError(f"the cache has {length} tokens of another model. Fix: compute them with the converted model")
    # The methods of the cache call the methods of its layers, so cropping and reordering also apply to the inputs.
    convolved: Any = object.__new__(_class_with_inputs(layer.__class__))
    vars(convolved).update(vars(layer), inputs={}, reaches={})
    cache.layers[index] = convolved
    return convolved


@functools.cache
def _class_with_inputs(layer_class: type) -> type:
    return type(layer_class.__name__, (_InputsOfConvolutions, layer_class), {"__module__": layer_class.__module__})


def _token_mask(mask: Any, length: int) -> TokenMask | None:
    """Return which of the last `length` tokens are no padding; None for all.

    `mask` is that of the attention: a token sees itself, unless it is padding. Its shape is (B, 1, L, K), where the L tokens are
    the last of K, or (B, K) for flash attention. Values are bool, or biases of the scores.
    """
    if mask is None:
        return None
    if hasattr(mask, "mask_mod"):  # of flex attention
        tokens = torch.arange(length, device=mask.kv_indices.device)
        batch = torch.arange(mask.shape[0], device=tokens.device)[:, None]
        offset = mask.shape[-1] - length
        return mask.mask_mod(batch, torch.zeros_like(batch), tokens[None], tokens[None] + offset)
    if mask.ndim == 2:
        return mask[:, -length:] != 0
    itself = mask[:, 0, -length:, -length:].diagonal(dim1=-2, dim2=-1)
    return itself if itself.dtype == torch.bool else itself == 0


def _last(x: Heads, tokens: int) -> Inputs:
    return x[:, :, max(0, x.shape[2] - tokens) :]


def _attentions(model: Any) -> Iterator[_Attention]:
    """Find the attention modules of a model, and check that each can have convolutions."""
    if not hasattr(model, "config"):
        raise ValueError(f"model = {type(model).__name__} has no config, so it is no model of transformers")
    found = 0
    for path, module in model.named_modules():
        for projections, channels in ((SEPARATE, "head_dim"), (FUSED, "head_size")):
            if not all(isinstance(getattr(module, name, None), nn.Module) for name in projections) or not hasattr(
                module, channels
            ):
                continue
            attention = _Attention(module, projections, getattr(module, channels))
            _check_attention(path, attention)
            found += 1
            yield attention
    if not found:
        raise ValueError(
            f"model = {type(model).__name__} has no attention with q_proj, k_proj, v_proj and head_dim, as in Llama, or with "
            "query_key_value and head_size, as in GPT-NeoX"
        )


def _check_attention(path: str, attention: _Attention) -> None:
    module = attention.module
    if any(hasattr(module, f"conv_{name}") for name in "qkv"):
        raise ValueError(f"model is already converted: {path} has convolutions")
    if not getattr(module, "is_causal", False) or not isinstance(getattr(module, "layer_idx", None), int):
        raise ValueError(f"model: {path} is no causal attention with a layer_idx")
    for projection, names in attention.projections.items():
        expected = attention.channels * sum(attention.heads(name) for name in names)
        actual = getattr(getattr(module, projection), "out_features", expected)
        if actual != expected:
            raise ValueError(f"model: {path}.{projection} has {actual} outputs, not {expected}, one per channel and head")


def _check_arguments(sizes: Mapping[str, Any], sharing: Any, dilation: Any) -> None:
    for name, size in sizes.items():
        _check(f"conv_{name}", size, Count | None)
    _check("sharing", sharing, Sharing)
    _check("dilation", dilation, Count)
    given = [size for size in sizes.values() if size is not None]
    if not given:
        raise ValueError("conv_q, conv_k and conv_v are None, so nothing would change. Fix: set one of them, as conv_k=4")
    if dilation > 1 and max(given) == 1:
        raise ValueError(f"dilation = {dilation} needs a kernel size of 2 or more")


def _check(name: str, value: Any, expected: Any) -> None:
    try:
        TypeAdapter(expected).validate_python(value, strict=True)
    except ValidationError as error:
        message = error.errors()[0]["msg"].removeprefix("Input should be ")
        raise ValueError(f"{name} = {value!r} should be {message}") from None
