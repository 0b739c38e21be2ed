"""Configuration of models and training.

Classes are frozen and keyword-only and check their own rules. This module does not import torch, so validating a study is fast.
No stage of the study depends on this file: they depend on plan/, which lists the values in use.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, computed_field, model_validator

Count = Annotated[int, Field(ge=1, lt=2**31)]
KernelGenerator = Literal["network", "decay", "state"]
KernelSize = Count | Literal["full", KernelGenerator]
"""Number of kernel values, `full` for the training length, or the generator of a kernel of any length."""
Position = Literal["none", "rotary", "alibi"]
"""Position encoding within a mixer."""
AddedPosition = Literal["none", "learned", "sinusoidal"]
"""Position vectors added to the token embedding."""
CanonPlaces = Literal["A", "B", "C", "D", "AB", "AC", "AD", "BC", "BD", "CD", "ABC", "ABD", "ACD", "BCD", "ABCD"]
"""Places of Canon layers in a block, in alphabetical order."""
ConstructionPlacement = Literal["input", "q", "k", "kv", "qk", "qkv", "logits", "token_shift"]
"""Where a construction has its convolution: cat/theory/ has the constructions of each task."""
FilterInit = Literal["identity", "random", "uniform", "shift", "primer"]
"""How the kernels of convolutions start."""


class Config(BaseModel):
    """Refuse unknown keys and values of another type, even if they could be converted."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
    renamed_keys: ClassVar[Mapping[str, str]] = {}
    """New name of each renamed key, for the error message."""

    @classmethod
    def unused_keys(cls, values: Mapping[str, Any]) -> set[str]:
        """Return keys that have no effect beside `values`, not yet checked. Defaults leave them out."""
        return set()


class Traits(Config):
    """Properties of a mixer or a whole model that rules and figures use."""

    @property
    def has_convolution(self) -> bool:
        """Whether it has a causal convolution that an ablation can remove."""
        return False

    @property
    def has_attention(self) -> bool:
        """Whether each output, in every layer, is a weighted mean of the values with non-negative weights."""
        return False

    @property
    def differs_in_training(self) -> bool:
        """Whether its outputs in training differ from those in evaluation: they are random, or training is softer."""
        return False

    def check_length(self, length: int) -> None:
        """Raise ValueError if it cannot be trained on sequences of `length` tokens."""


class VariantConfig(Traits):
    """A model of a study, trained or constructed."""

    def max_length(self, length: int) -> int | None:
        """Return the maximum input length after training at `length`; None: no limit."""
        return None


class MixerConfig(Traits):
    """Settings of one token mixer. The width belongs to the model."""

    label: ClassVar[str]
    """Name in figures and reports; by default the name of the folder."""
    label_with_convolution: ClassVar[str | None] = None
    """Name with a convolution, before the convolved projections, as in `CAT-QK`; None: `label`, and no projections."""
    paper: ClassVar[str | None] = None
    """Where the layer is published that the defaults of all keys describe; None: no paper has this layer."""
    differs: ClassVar[str | None] = None
    """What still differs from the published layer, whatever the keys are; None: nothing that changes its outputs."""

    @classmethod
    def __pydantic_init_subclass__(cls, **options: Any) -> None:
        super().__pydantic_init_subclass__(**options)
        if "label" not in vars(cls):
            folder = cls.__module__.removesuffix(".config").rpartition(".")[2]
            cls.label = folder.replace("_", " ").capitalize()

    @computed_field  # type: ignore[prop-decorator]
    @property
    def mixer(self) -> str:
        """Name of its folder in cat/mixers/, or import path of a package elsewhere."""
        return mixer_name(type(self))

    @property
    def title(self) -> str:
        """Name of this configuration in figures and reports, without its convolutions."""
        return self.label

    def departures(self) -> dict[str, Any]:
        """Return the keys that depart from the published layer, with their values; empty if no paper has the layer."""
        if self.paper is None:
            return {}
        defaults = {key: field.default for key, field in type(self).model_fields.items() if not field.is_required()}
        return {key: value for key, default in defaults.items() if (value := getattr(self, key)) != default}

    @property
    def selects_tokens(self) -> bool:
        """Whether an output may depend on only some of the earlier tokens, as in sparse attention."""
        return False

    def check_width(self, width: int) -> None:
        """Raise ValueError if the mixer cannot have `width` channels."""


def mixer_name(config: type[MixerConfig]) -> str:
    """Return the name of the mixer that a configuration class describes."""
    return config.__module__.removeprefix("cat.mixers.").removesuffix(".config")


class ModelConfig(VariantConfig):
    """Settings of a trained model: pre-norm residual blocks.

    Each of the `layers` blocks has a mixer and, if configured, an MLP.
    """

    width: Count
    """Channels D of the residual stream."""
    layers: Count
    mlp: Count | None = None
    """Hidden width of the MLP as a multiple of `width`; None: blocks have no MLP."""
    activation: Literal["gelu", "swiglu", "relu2"] = "gelu"
    """Activation of the MLP: GELU as in Pythia, SwiGLU as in LLaMA (arXiv 2002.05202), squared ReLU as in Primer (2109.08668)."""
    canon: CanonPlaces | None = None
    """Places of Canon layers, x + conv(x) per channel (arXiv 2512.17351); None: no place.

    A: the input of every mixer. B: its queries, keys and values. C: the input of every MLP. D: inside it, before the activation.
    """
    canon_size: Count = 4
    """Kernel size of Canon layers."""
    norm: Literal["layer", "rms"] = "layer"
    """Norm before every mixer, every MLP and the head: LayerNorm, or RMSNorm (arXiv 1910.07467)."""
    tied: bool = False
    """Use the token embedding as the weight of the head."""
    position: AddedPosition = "none"
    """Position vectors added to the token embedding."""
    mixers: Annotated[tuple[SerializeAsAny[MixerConfig], ...], Field(min_length=1)]
    """Mixers of the first layers, repeated until there are `layers`."""

    @classmethod
    def unused_keys(cls, values: Mapping[str, Any]) -> set[str]:
        unused = {"activation"} if values.get("mlp") is None else set()
        return unused | ({"canon_size"} if values.get("canon") is None else set())

    @model_validator(mode="after")
    def _activation_needs_mlp(self) -> Self:
        if self.mlp is None and self.activation != "gelu":
            raise ValueError(f"activation = {self.activation} needs an MLP. Fix: set mlp")
        return self

    @model_validator(mode="after")
    def _canon_fits(self) -> Self:
        if self.canon is None:
            if self.canon_size != type(self).model_fields["canon_size"].default:
                raise ValueError(f"canon_size = {self.canon_size} needs canon, the places of its convolutions")
            return self
        if self.mlp is None and self.canon_in_mlp:
            raise ValueError(f"canon = {self.canon} has a convolution in the MLP. Fix: set mlp, or leave C and D out")
        for mixer in self.mixers:
            if "B" in self.canon and not isinstance(mixer, QKVConfig):
                raise ValueError(f"canon = {self.canon}: B needs queries, keys and values, which {mixer.mixer} does not have")
        return self

    @model_validator(mode="after")
    def _mixers_fit(self) -> Self:
        if self.layers % len(self.mixers):
            names = ", ".join(mixer.mixer for mixer in self.mixers)
            raise ValueError(f"mixer = [{names}] needs a multiple of {len(self.mixers)} layers, not layers = {self.layers}")
        for index, mixer in enumerate(self.mixers):
            with self._naming(index):
                mixer.check_width(self.width)
        return self

    @property
    def layer_mixers(self) -> tuple[MixerConfig, ...]:
        """The mixer configuration of each layer, first to last."""
        return self.mixers * (self.layers // len(self.mixers))

    @property
    def canon_in_mlp(self) -> bool:
        """Whether the MLP of a block depends on earlier tokens."""
        return self.canon is not None and ("C" in self.canon or "D" in self.canon)

    @property
    def has_convolution(self) -> bool:
        return self.canon is not None or any(mixer.has_convolution for mixer in self.mixers)

    @property
    def has_attention(self) -> bool:
        return all(mixer.has_attention for mixer in self.mixers)

    @property
    def differs_in_training(self) -> bool:
        return any(mixer.differs_in_training for mixer in self.mixers)

    def check_length(self, length: int) -> None:
        if self.canon is not None and self.canon_size > length:
            raise ValueError(f"canon_size = {self.canon_size} is longer than the training length of {length}")
        for index, mixer in enumerate(self.mixers):
            with self._naming(index):
                mixer.check_length(length)

    def max_length(self, length: int) -> int | None:
        return length if self.position == "learned" else None

    @contextmanager
    def _naming(self, index: int) -> Iterator[None]:
        """Name the mixer in an error, if there are several."""
        try:
            yield
        except ValueError as error:
            raise ValueError(f"mixer {index}: {error}" if len(self.mixers) > 1 else str(error)) from None


CONVOLUTION_KEYS = ("sharing", "dilation", "residual", "filter_init", "filter_bias", "filter_norm", "conv_activation")
"""Keys that have an effect only on queries, keys or values with a convolution."""


class QKVConfig(MixerConfig):
    """A mixer with heads, queries, keys and values, and an optional causal convolution on each."""

    projections: ClassVar[tuple[str, ...]] = ("q", "k", "v")
    """Projections that can have a convolution."""
    renamed_keys: ClassVar = {"q": "conv_q", "k": "conv_k", "v": "conv_v"}
    heads: Count
    conv_q: KernelSize | None = None
    """Kernel size of the causal convolution on the queries; None: no convolution. `conv_k` and `conv_v` work alike.

    `full` is the training length. Other names generate a kernel of any length: from a small `network`, from a sum of fixed
    exponentials (`decay`), or from a `state` space, whose decays are learned.
    """
    conv_k: KernelSize | None = None
    conv_v: KernelSize | None = None
    sharing: Literal["head", "channel", "mixing"] = "head"
    """One kernel per head, one per channel, or one per pair of input and output heads (mixing)."""
    dilation: Count = 1
    """Tokens between consecutive kernel values; 1: no token is skipped."""
    filter_size: Count | None = None
    """Hidden units of a `network` kernel, number of decays of a `decay` or `state` kernel."""
    token_shift: bool = False
    """Project m x_t + (1 - m) x_{t-1} with learned m, per channel and projection, as RWKV does (arXiv 2305.13048)."""
    residual: bool = False
    """Add the input of each convolution to its output, after the norm of the kernel."""
    filter_init: FilterInit = "identity"
    """Initialize convolutions as the identity with a little noise, or kernels at random (normal or as nn.Conv1d does: uniform).

    For explicit kernels also as published: `shift`, a and 1 - a with a uniform in (0, 1) (KV shifting, arXiv 2411.19574), or
    `primer`, 1/2 at lag 0 and 1 / (2 W) at the others (arXiv 2109.08668).
    """
    filter_bias: bool = False
    """Add a learned bias to the convolution output."""
    filter_norm: bool = False
    """Divide every kernel by the sum of its absolute values; for a generated kernel, the sum over the training length."""
    conv_activation: Literal["none", "silu"] = "none"
    """Activation after each convolution on the queries, keys and values; those without a convolution have none."""

    @classmethod
    def unused_keys(cls, values: Mapping[str, Any]) -> set[str]:
        keys = [f"conv_{projection}" for projection in cls.projections]
        sizes = [size for key in keys if (size := values.get(key, cls.model_fields[key].default)) is not None]
        unused = set() if sizes else {key for key in CONVOLUTION_KEYS if key != "dilation"}
        if not any(size in get_args(KernelGenerator) for size in sizes):
            unused.add("filter_size")
        if not any(isinstance(size, int) and size > 1 for size in sizes):
            unused.add("dilation")
        return unused

    @model_validator(mode="after")
    def _convolution_settings_apply(self) -> Self:
        if not self.kernel_sizes:
            for key in CONVOLUTION_KEYS:
                if getattr(self, key) != type(self).model_fields[key].default:
                    *others, last = (f"conv_{projection}" for projection in self.projections)
                    value = json.dumps(getattr(self, key))
                    raise ValueError(f"{key} = {value} needs a convolution. Fix: set {', '.join(others)} or {last}")
        generators = get_args(KernelGenerator)
        generated = [projection for projection, size in self.kernel_sizes.items() if size in generators]
        if generated and self.filter_size is None:
            key = f"conv_{generated[0]}"
            raise ValueError(f"{key} = {getattr(self, key)} needs filter_size, its hidden units or decays")
        if generated == [] and self.filter_size is not None:
            raise ValueError(f"filter_size = {self.filter_size} needs a generated kernel: {', '.join(generators)}")
        if self.dilation > 1 and not any(isinstance(size, int) and size > 1 for size in self.kernel_sizes.values()):
            raise ValueError(f"dilation = {self.dilation} needs a convolution with an explicit kernel size of 2 or more")
        if self.sharing == "mixing" and self.heads == 1:
            raise ValueError("sharing = mixing needs more than one head")
        return self

    @model_validator(mode="after")
    def _init_fits_kernels(self) -> Self:
        if self.filter_init in ("identity", "random"):
            return self
        for projection, size in self.kernel_sizes.items():
            if size in get_args(KernelGenerator):
                raise ValueError(f"filter_init = {self.filter_init} needs kernels with a size, not conv_{projection} = {size}")
            if self.filter_init == "shift" and size != 2:
                raise ValueError(f"filter_init = shift needs kernels of size 2, not conv_{projection} = {size}")
        if self.sharing == "mixing" and self.filter_init != "uniform":
            raise ValueError(f"filter_init = {self.filter_init} needs sharing = head or channel, not mixing")
        return self

    def check_width(self, width: int) -> None:
        if width % self.heads:
            raise ValueError(f"heads = {self.heads} does not divide width = {width}")

    @property
    def linear_bias(self) -> bool:
        """Whether the projections to q, k, v and the output have a bias."""
        return False

    def heads_of(self, projection: str) -> int:
        """Return the number of heads of a projection."""
        return self.heads

    def channels_of(self, projection: str, width: int) -> int:
        """Return the channels per head of a projection in a model with `width` channels."""
        return width // self.heads

    def departures(self) -> dict[str, Any]:
        """As of every mixer, but without the convolutions of mixers that have a name of their own with them, such as LinCAT."""
        convolutions = {*CONVOLUTION_KEYS, "filter_size", *(f"conv_{projection}" for projection in self.projections)}
        own = convolutions if self.label_with_convolution is not None else set()
        return {key: value for key, value in super().departures().items() if key not in own}

    @property
    def kernel_sizes(self) -> dict[str, KernelSize]:
        """Kernel size by projection, for the projections that have a convolution."""
        sizes = {projection: getattr(self, f"conv_{projection}") for projection in self.projections}
        return {projection: size for projection, size in sizes.items() if size is not None}

    @property
    def init_sums(self) -> Mapping[str, int]:
        """Tokens that an identity kernel sums at initialization, by projection; 1 if not listed."""
        return {}

    @property
    def has_convolution(self) -> bool:
        return bool(self.kernel_sizes)

    def check_length(self, length: int) -> None:
        for projection, size in self.kernel_sizes.items():
            if not isinstance(size, int):
                continue
            if size > length:
                raise ValueError(f"conv_{projection} = {size} is longer than the training length of {length}")
            if (size - 1) * self.dilation >= length:
                dilated = f"conv_{projection} = {size} with dilation = {self.dilation}"
                raise ValueError(f"{dilated} is longer than the training length of {length}")


class DotProductConfig(QKVConfig):
    """A mixer that compares queries and keys by their products, which can be scaled and depend on positions."""

    position: Position = "none"
    """Position encoding of queries and keys."""
    qk_norm: bool = False
    """Scale queries and keys to unit length after the convolution, and learn one temperature per head."""
    temperature: bool = False
    """Learn one temperature per head without scaling queries and keys."""

    @model_validator(mode="after")
    def _one_temperature(self) -> Self:
        if self.temperature and self.qk_norm:
            raise ValueError("temperature = true: qk_norm = true already learns a temperature. Fix: remove it")
        return self

    def check_width(self, width: int) -> None:
        super().check_width(width)
        if self.position == "rotary" and (channels := self.channels_of("q", width)) % 2:
            raise ValueError(f"position = rotary needs an even head width, not {channels}")

    @property
    def has_attention(self) -> bool:
        return True

    def _refuse_alibi(self, reason: str) -> Self:
        if self.position == "alibi":
            raise ValueError(f"position = alibi {reason}")
        return self


class TrainingConfig(Config):
    """Settings of a training run: AdamW, linear warm-up, cosine decay to zero, clipping and early stopping."""

    renamed_keys: ClassVar = {
        "clip": "grad_clip",
        "validate_every": "eval_every",
        "stop_at": "early_stop_accuracy",
        "stop_after": "early_stop_patience",
    }
    steps: Count
    batch: Count
    """Sequences per step."""
    micro_batch: Count | None = None
    """Sequences per forward pass, if a whole batch does not fit into memory; gradients are accumulated over the batch."""
    compile: bool = False
    """Train with torch.compile: pays off for long training of large models; changes the last bits of the results."""
    weight_decay: Annotated[float, Field(ge=0)]
    """Weight decay of linear-layer matrices; kernels, norms and embeddings have none."""
    grad_clip: Annotated[float, Field(gt=0)]
    """Maximum norm of the gradient."""
    warmup: Annotated[float, Field(ge=0, lt=1)]
    """Fraction of the steps with a rising learning rate."""
    eval_every: Count
    """Steps between validations."""
    early_stop_accuracy: Annotated[float, Field(gt=0, le=1)]
    """Validation accuracy that ends training early, on tasks that are scored by accuracy."""
    early_stop_patience: Count
    """Consecutive validations that must reach `early_stop_accuracy`."""

    @model_validator(mode="after")
    def _micro_batch_is_smaller(self) -> Self:
        if self.micro_batch is not None and self.micro_batch >= self.batch:
            raise ValueError(f"micro_batch = {self.micro_batch} must be smaller than batch = {self.batch}")
        return self
