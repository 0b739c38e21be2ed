"""Human names for the slugs of params.yaml: `CAT-QK, RoPE` for a variant, `2-gram recall` for a task."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Set

from cat.config import QKVConfig, VariantConfig
from cat.mixers.delta.config import DeltaConfig
from cat.mixers.landmark.config import LandmarkConfig
from cat.mixers.registry import ConstructionConfig, HybridConfig
from pipeline.config.study import Study

MIXERS = {
    "attention": "Transformer", "linear": "Linear attention", "based": "Based", "performer": "Performer", "delta": "DeltaNet",
    "gla": "GLA", "landmark": "Landmark attention", "hyena": "Hyena", "mamba": "Mamba",
}  # fmt: skip
WITH_CONVOLUTION = {"attention": "CAT", "linear": "LinCAT", "landmark": "Landmark CAT"}
POSITIONS = {"rotary": "RoPE", "alibi": "ALiBi", "learned": "learned positions", "sinusoidal": "sinusoidal positions"}
GENERATED = {
    "full": "full-length kernels",
    "network": "implicit kernels",
    "decay": "fixed decays",
    "state": "state-space kernels",
}
USUAL_KERNEL = 4


def variant_label(study: Study, variant: str) -> str:
    """The name of a variant, unique within the study."""
    return _variant_labels(study)[variant]


def task_label(study: Study, task: str) -> str:
    """The name of a task, unique within the study."""
    return _task_labels(study)[task]


def with_slug(label: str, slug: str) -> str:
    """`CAT-QK (qk)`: the name and its slug."""
    return label if label == slug or label.endswith(f"({slug})") else f"{label} ({slug})"


@functools.lru_cache(maxsize=8)
def _cached_labels(models: tuple[tuple[str, VariantConfig], ...]) -> dict[str, str]:
    details = [set(_details(model)) for _, model in models if isinstance(model, QKVConfig)]
    shared = set.intersection(*details) if len(details) > 1 else set()
    return _unique({name: _describe(model, shared) for name, model in models})


def _variant_labels(study: Study) -> dict[str, str]:
    return _cached_labels(tuple(study.variants.items()))


def _task_labels(study: Study) -> dict[str, str]:
    return _unique({name: section.data.label for name, section in study.tasks.items()})


def _unique(labels: dict[str, str]) -> dict[str, str]:
    """Append the slug to labels that several slugs share."""
    count = [*labels.values()].count
    return {slug: with_slug(label, slug) if count(label) > 1 else label for slug, label in labels.items()}


def _describe(model: VariantConfig, shared: Set[str] = frozenset()) -> str:
    """The mixer and its settings that differ from the defaults, without the details that the whole study shares."""
    if isinstance(model, ConstructionConfig):
        return "Construction, not trained"
    details = [detail for detail in _details(model) if detail not in shared]
    if isinstance(model, HybridConfig):
        blocks = " + ".join(_describe(block, shared).removesuffix(" (no convolution)") for block in model.blocks)
        return ", ".join([blocks, *details])
    plain = model.mixer == "attention" and not model.has_convolution and not details
    return f"{_mixer_name(model)} (no convolution)" if plain else ", ".join([_mixer_name(model), *details])


def _details(model: VariantConfig) -> list[str]:
    least = len(model.blocks) if isinstance(model, HybridConfig) else 1
    return [*_of_the_mixer(model), *_of_the_model(model, least)]


def _mixer_name(model: VariantConfig) -> str:
    name = MIXERS.get(model.mixer, model.mixer)
    if isinstance(model, DeltaConfig) and model.gate:
        name = f"Gated {name}"
    if not (isinstance(model, QKVConfig) and model.has_convolution):
        return name
    convolved = "".join(projection.upper() for projection in model.kernel_sizes if len(projection) == 1)
    if model.mixer in WITH_CONVOLUTION:
        return f"{WITH_CONVOLUTION[model.mixer]}-{convolved}" if convolved else WITH_CONVOLUTION[model.mixer]
    return name


def _of_the_mixer(model: VariantConfig) -> Iterator[str]:
    """Differences from the default: one head, one kernel of size 4 per head, QK-norm, no positional encoding."""
    if not isinstance(model, QKVConfig):
        return
    sizes = {size for projection, size in model.kernel_sizes.items() if projection != "summary"}
    for size in sorted(sizes, key=str):
        if size != USUAL_KERNEL:
            yield GENERATED[size] if isinstance(size, str) else f"kernel {size}"
    if model.dilation > 1:
        yield f"dilation {model.dilation}"
    if model.sharing != "head" and model.mixer in WITH_CONVOLUTION:
        yield {"channel": "per channel", "mixing": "head mixing"}[model.sharing]
    if model.filter_norm:
        yield "unit kernels"
    if model.position in POSITIONS:
        yield POSITIONS[model.position]
    if model.mixer == "attention" and not model.qk_norm:
        yield "learned temperature" if model.temperature else "no QK-norm"
    if isinstance(model, LandmarkConfig):
        yield f"top {model.top} of blocks of {model.block}"
    if model.heads > 1:
        yield f"{model.heads} heads"


def _of_the_model(model: VariantConfig, least: int) -> Iterator[str]:
    layers = getattr(model, "layers", least)
    if layers > least:
        yield f"{layers} layers"
