"""Find a mixer by its name, and compose a model from settings in one mapping.

A mixer is a folder: config.py defines its configuration, layer.py its layer, examples.py the configurations for its checks.
`attention` is cat/mixers/attention/; `my_package.retention` is a folder of a package elsewhere.

    {mixer: attention, width: 64, layers: 1, heads: 1}                           one mixer in every layer
    {mixer: [mamba, attention], width: 64, layers: 2, heads: 1}                  two mixers, one after the other
    {mixer: [{mixer: mamba, expand: 1}, attention], width: 64, layers: 2, ...}   a mixer with keys of its own
"""

from __future__ import annotations

import functools
import pkgutil
from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple, get_args

import cat.mixers
from cat.config import AddedPosition, Config, ConstructionPlacement, MixerConfig, ModelConfig, Position, VariantConfig

CONSTRUCTION = "construction"
"""In place of a mixer: the variant is a construction for its task, by default the paper's, which is not trained."""
MODEL_KEYS = tuple(key for key in ModelConfig.model_fields if key != "mixers")
"""Keys that belong to a whole model and not to one mixer."""
POSITIONS = tuple(dict.fromkeys((*get_args(Position), *get_args(AddedPosition))))


class ConstructionConfig(VariantConfig):
    """One untrained attention layer with hand-set weights, which cat/theory/ computes for a task."""

    placement: ConstructionPlacement | None = None
    """Where the convolution is; None: where the paper has it."""

    @property
    def has_attention(self) -> bool:
        return True


AnyVariant = ModelConfig | ConstructionConfig
"""Configuration of a variant in a study: a model to train, or a construction."""


class Source(NamedTuple):
    """Where a value comes from: the variant or the defaults, and the path of its key there."""

    inherited: bool
    path: tuple[str | int, ...]


class Section(NamedTuple):
    """The part of a model that one class of configuration describes, not yet checked."""

    schema: type[Config]
    values: dict[str, Any]
    sources: dict[str, Source]

    def set(self, key: str, value: object, source: Source) -> None:
        """Set a key, unless it is set already."""
        if key not in self.values:
            self.values[key], self.sources[key] = value, source


class Composition(NamedTuple):
    """The sections of a model, and the problems of keys that belong to none of them, each with its path."""

    model: Section
    mixers: list[Section]
    problems: list[tuple[tuple[str | int, ...], str]]


class UnknownMixerError(ValueError):
    """Raised for a mixer that does not exist; `known` has the mixers of this library."""

    def __init__(self, problem: str):
        super().__init__(problem)
        self.known = mixer_names()


@functools.cache
def mixer_names() -> tuple[str, ...]:
    """Return the names of the mixers of this library, sorted."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(cat.mixers.__path__) if module.ispkg))


def mixer_module(name: str, module: str) -> str:
    """Return the import path of the `config`, `layer`, `examples` or `op` module of a mixer."""
    return f"{name if '.' in name else f'cat.mixers.{name}'}.{module}"


@functools.cache
def mixer_class(name: str) -> type[MixerConfig]:
    """Return the configuration class of a mixer, without importing torch.

    Raises UnknownMixerError if there is no such mixer, ValueError if its config.py does not define exactly one configuration.
    """
    path = mixer_module(name, "config")
    try:
        known = "." in name or name in mixer_names()
        found = known and find_spec(path) is not None
    except (ImportError, ValueError):
        found = False
    if not found:
        raise UnknownMixerError(f"there is no {path.replace('.', '/')}.py" if "." in name else "unknown mixer")
    module = import_module(path)
    own_classes = [value for value in vars(module).values() if isinstance(value, type) and value.__module__ == path]
    configs = [value for value in own_classes if issubclass(value, MixerConfig)]
    if len(configs) != 1:
        raise ValueError(f"{path} must define exactly one MixerConfig, found {len(configs)}")
    config: type[MixerConfig] = configs[0]
    return config


def mixer_examples(name: str) -> dict[str, MixerConfig]:
    """Return the example configurations of a mixer by name, without importing torch.

    Raises UnknownMixerError if there is no such mixer, ValueError if its folder has no examples of it.
    """
    config, path = mixer_class(name), mixer_module(name, "examples")
    if find_spec(path) is None:
        raise ValueError(f"there is no {path.replace('.', '/')}.py")
    examples = getattr(import_module(path), "EXAMPLES", None)
    if not isinstance(examples, dict) or not examples or not all(type(example) is config for example in examples.values()):
        raise ValueError(f"{path} must define EXAMPLES, a dict of names and {config.__name__} objects")
    return examples


def compose(settings: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> Composition:
    """Assign each key of `settings` to the model or to every mixer that has it; then each key of `defaults` that is not yet set.

    A default is left out if no part of the model has its key, if it has no effect there, or if `settings` has the key. Raises
    UnknownMixerError or ValueError for the mixers themselves.
    """
    defaults = defaults or {}
    model = Section(ModelConfig, {}, {})
    mixers: list[Section] = []
    problems: list[tuple[tuple[str | int, ...], str]] = []
    for index, entry in enumerate(mixer_entries(settings.get("mixer", defaults.get("mixer")))):
        section = Section(mixer_class(entry["mixer"]), {}, {})
        for key, value in entry.items():
            path = ("mixer", index, key)
            if key in MODEL_KEYS and key not in section.schema.model_fields:
                problems.append((path, f"is a key of the model, not of a mixer. Fix: move {key} out of the list"))
            elif key != "mixer":
                section.set(key, value, Source("mixer" not in settings, path))
        mixers.append(section)
    for inherited, keys in ((False, settings), (True, defaults)):
        for key, value in keys.items():
            if key == "mixer" or (inherited and key in settings):
                continue
            takers = list(_takers(key, value, model, mixers))
            for section in takers:
                section.set(key, value, Source(inherited, (key,)))
            if not (takers or inherited):
                problems.append(((key,), _no_taker(key, value, mixers)))
    for section in (model, *mixers):
        for key in section.schema.unused_keys(section.values):
            if section.sources.get(key) == Source(True, (key,)):
                del section.values[key], section.sources[key]
    return Composition(model, mixers, problems)


def model_config(**settings: Any) -> ModelConfig:
    """Build a model's configuration from keys in one mapping, such as `mixer="attention", width=64, layers=1, heads=1`.

    Raises ValueError (pydantic's ValidationError) for an unknown key or an invalid value.
    """
    composed = compose(settings)
    for path, problem in composed.problems:
        raise ValueError(f"{'.'.join(map(str, path))}: {problem}")
    mixers = tuple(section.schema.model_validate(section.values) for section in composed.mixers)
    return ModelConfig.model_validate({**composed.model.values, "mixers": mixers})


def read_model(saved: Mapping[str, Any]) -> ModelConfig:
    """Rebuild the configuration that `ModelConfig.model_dump` has saved."""
    mixers = tuple(
        mixer_class(mixer["mixer"]).model_validate({key: value for key, value in mixer.items() if key != "mixer"}, strict=False)
        for mixer in saved["mixers"]
    )
    return ModelConfig.model_validate({**saved, "mixers": mixers})


def mixer_entries(mixer: object) -> list[dict[str, Any]]:
    """Return the mixers of a model, each a mapping with its name under `mixer`. Raises ValueError if `mixer` is anything else."""
    if mixer is None:
        raise ValueError("is missing")
    if mixer in ([], ()):
        raise ValueError("needs at least one mixer")
    entries = []
    for entry in mixer if isinstance(mixer, list | tuple) else [mixer]:
        named = {"mixer": entry} if isinstance(entry, str) else entry
        if not isinstance(named, dict) or not isinstance(named.get("mixer"), str):
            raise ValueError("must be the name of a mixer, or a list of names and of mappings with a key mixer")
        entries.append(named)
    return entries


def _takers(key: str, value: object, model: Section, mixers: list[Section]) -> Iterator[Section]:
    """The sections that a key belongs to. A model has one key `position`, whose value says which part applies it."""
    in_mixers = [section for section in mixers if key in section.schema.model_fields]
    if key == "position":
        if value in get_args(AddedPosition) and value != "none":
            yield model
        elif value in POSITIONS:
            yield from in_mixers or ([model] if value == "none" else [])
    elif key in MODEL_KEYS:
        yield model
    else:
        yield from in_mixers


def no_position(value: object) -> str:
    """Return the problem of a position encoding without a taker."""
    if value not in POSITIONS:
        return f"must be {', '.join(map(repr, POSITIONS[:-1]))} or {POSITIONS[-1]!r}"
    *others, last = get_args(AddedPosition)
    return f"no mixer of this variant has it. Fix: use {', '.join(others)} or {last}"


def _no_taker(key: str, value: object, mixers: list[Section]) -> str:
    if key == "position":
        return no_position(value)
    return "unknown key"
