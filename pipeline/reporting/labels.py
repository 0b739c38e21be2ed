"""Human names for the slugs of params.yaml: `CAT-QK, RoPE` for a variant, `2-gram recall` for a task.

A name follows from the configuration, unless params.yaml states one as `label`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Set

from cat.config import DotProductConfig, MixerConfig, ModelConfig, QKVConfig
from cat.mixers.attention.config import AttentionConfig
from cat.mixers.landmark.config import LandmarkConfig
from cat.mixers.registry import AnyVariant, ConstructionConfig
from pipeline.config.study import Study

POSITIONS = {"rotary": "RoPE", "alibi": "ALiBi", "learned": "learned positions", "sinusoidal": "sinusoidal positions"}
GENERATED = {
    "full": "full-length kernels",
    "network": "implicit kernels",
    "decay": "fixed decays",
    "state": "state-space kernels",
}
USUAL_KERNEL = 4
PLACEMENTS = {
    "input": "Canon-A",
    "q": "Q",
    "k": "K",
    "kv": "KV shifting",
    "qk": "QK",
    "qkv": "Canon-B",
    "logits": "multi-token attention",
    "token_shift": "token shift",
}
"""Placement of a construction -> its name."""


def variant_label(study: Study, variant: str) -> str:
    """The name of a variant, unique within the study."""
    return _variant_labels(study)[variant]


def task_label(study: Study, task: str) -> str:
    """The name of a task, unique within the study."""
    return _task_labels(study)[task]


def with_slug(label: str, slug: str) -> str:
    """`CAT-QK (qk)`: the name and its slug."""
    return label if label == slug or label.endswith(f"({slug})") else f"{label} ({slug})"


def with_names(study: Study, reason: str) -> str:
    """The reason of a verdict with names: `CAT-K (k) against 1 on associative recall (ar) at length 256`."""

    def variant(match: re.Match[str]) -> str:
        return with_slug(variant_label(study, match[0]), match[0]) if match[0] in study.variants else match[0]

    def task(match: re.Match[str]) -> str:
        return with_slug(task_label(study, match[0]), match[0]) if match[0] in study.tasks else match[0]

    reason = re.sub(r"(?<= on )\w+(?= at length )", task, reason)
    return re.sub(r"\b\w+(?= against | is no better than)|(?<= against )\w+|\b\w+(?= on .* at length )", variant, reason)


@functools.lru_cache(maxsize=8)
def _cached_labels(models: tuple[tuple[str, AnyVariant], ...], stated: tuple[tuple[str, str], ...]) -> dict[str, str]:
    mixers = [mixer for _, model in models if isinstance(model, ModelConfig) for mixer in model.mixers]
    details = [set(_details(mixer)) for mixer in mixers if isinstance(mixer, QKVConfig)]
    shared = set.intersection(*details) if len(details) > 1 else set()
    return _unique({name: _describe(model, shared) for name, model in models} | dict(stated))


def _variant_labels(study: Study) -> dict[str, str]:
    return _cached_labels(tuple(study.variants.items()), tuple(study.variant_labels.items()))


def _task_labels(study: Study) -> dict[str, str]:
    return _unique({name: study.task_labels.get(name, section.data.label) for name, section in study.tasks.items()})


def _unique(labels: dict[str, str]) -> dict[str, str]:
    """Append the slug to labels that several slugs share."""
    count = [*labels.values()].count
    return {slug: with_slug(label, slug) if count(label) > 1 else label for slug, label in labels.items()}


def _describe(model: AnyVariant, shared: Set[str]) -> str:
    """The mixers and the settings that differ from the defaults, without the details that the whole study shares."""
    if isinstance(model, ConstructionConfig):
        return "Construction, not trained" if model.placement is None else f"Construction, {PLACEMENTS[model.placement]}"
    assert isinstance(model, ModelConfig)
    layers = [f"{model.layers} layers"] if model.layers > len(model.mixers) else []
    if model.canon is not None:
        layers.insert(0, f"Canon-{model.canon}")
    position = model.position if model.position != "none" else None
    if len(model.mixers) > 1:
        names = " + ".join(", ".join([_mixer_name(mixer), *_distinct(mixer, shared)]) for mixer in model.mixers)
        return ", ".join([names, *([POSITIONS[position]] if position else []), *layers])
    (mixer,) = model.mixers
    details = [*_distinct(mixer, shared, position), *layers]
    plain = mixer.mixer == "attention" and not mixer.has_convolution and not details
    return f"{_mixer_name(mixer)} (no convolution)" if plain else ", ".join([_mixer_name(mixer), *details])


def _distinct(mixer: MixerConfig, shared: Set[str], position: str | None = None) -> list[str]:
    return [detail for detail in _details(mixer, position) if detail not in shared]


def _mixer_name(mixer: MixerConfig) -> str:
    if isinstance(mixer, QKVConfig) and mixer.has_convolution and (name := mixer.label_with_convolution):
        convolved = "".join(projection.upper() for projection in mixer.kernel_sizes if len(projection) == 1)
        return f"{name}-{convolved}" if convolved else name
    return mixer.title


def _details(mixer: MixerConfig, added_position: str | None = None) -> Iterator[str]:
    """Differences from the default: one head, one kernel of size 4 per head, QK-norm, no positional encoding."""
    position = added_position or (mixer.position if isinstance(mixer, DotProductConfig) else "none")
    if not isinstance(mixer, QKVConfig):
        yield from [POSITIONS[position]] if position in POSITIONS else []
        return
    sizes = {size for projection, size in mixer.kernel_sizes.items() if projection != "summary"}
    for size in sorted(sizes, key=str):
        if size != USUAL_KERNEL:
            yield GENERATED[size] if isinstance(size, str) else f"kernel {size}"
    if mixer.dilation > 1:
        yield f"dilation {mixer.dilation}"
    if mixer.sharing != "head" and mixer.label_with_convolution:
        yield {"channel": "per channel", "mixing": "head mixing"}[mixer.sharing]
    if mixer.token_shift:
        yield "token shift"
    if mixer.residual:
        yield "residual"
    fields = type(mixer).model_fields
    if mixer.filter_init != fields["filter_init"].default:
        yield f"{mixer.filter_init} start"
    if mixer.filter_norm:
        yield "unit kernels"
    if mixer.label_with_convolution is None and mixer.has_convolution != (fields["conv_k"].default is not None):
        yield "convolutions" if mixer.has_convolution else "no convolutions"
    if position in POSITIONS:
        yield POSITIONS[position]
    if isinstance(mixer, AttentionConfig) and not mixer.qk_norm:
        yield "learned temperature" if mixer.temperature else "no QK-norm"
    if isinstance(mixer, LandmarkConfig):
        yield f"top {mixer.top} of blocks of {mixer.block}"
    if mixer.heads > 1:
        yield f"{mixer.heads} heads"
    if isinstance(mixer, AttentionConfig):
        yield from _attention_details(mixer)


def _attention_details(mixer: AttentionConfig) -> Iterator[str]:
    if mixer.kv_heads is not None:
        yield f"{mixer.kv_heads} key heads"
    if mixer.rope_base != 10_000:
        yield f"RoPE base {mixer.rope_base:g}"
    if mixer.rope_scale != 1:
        yield f"RoPE scale {mixer.rope_scale:g}"
    if mixer.window is not None:
        yield f"window {mixer.window}"
    if mixer.dropout:
        yield f"dropout {mixer.dropout:g}"
    if mixer.bias:
        yield "biases"
