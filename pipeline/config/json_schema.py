"""The JSON schema of params.yaml, with which editors complete and check the file."""

from __future__ import annotations

from typing import Any

from cat.config import Config, ModelConfig
from cat.mixers.registry import CONSTRUCTION, MODEL_KEYS, POSITIONS, ConstructionConfig, mixer_class, mixer_names
from pipeline.config.names import LINE, NAME
from pipeline.config.study import CellTraining, Study, StudyFile

_LABEL = {"type": "string", "pattern": LINE}
_ENTRY = {"type": "object", "required": ["mixer"], "properties": {"mixer": {"type": "string"}}}


def json_schema(study: Study) -> dict[str, Any]:
    """The schema of the file; variants may have the keys of the library's mixers and of those of `study`."""
    schema = StudyFile.model_json_schema()
    variant = _variant(study)
    sections: dict[str, Any] = schema["properties"]
    sections["defaults"] |= {**variant, "properties": {**variant["properties"], "training": _training()}}
    settings = {**_training(), "additionalProperties": False}
    per_task = {"type": "object", "additionalProperties": settings}
    own_training = {**settings, "properties": {**settings["properties"], "tasks": per_task}}
    sections["variants"]["patternProperties"] = {
        NAME: {**variant, "properties": {**variant["properties"], "training": own_training, "label": _LABEL}}
    }
    schema["$defs"]["TaskFile"]["properties"]["training"] |= settings
    switched_off = {"type": "object", "properties": {key: {"maxItems": 0} for key in ("tasks", "variants")}, "maxProperties": 2}
    ablations = sections["ablations"]["patternProperties"]
    ablations[NAME] = {"anyOf": [ablations[NAME], switched_off]}
    return schema


def _variant(study: Study) -> dict[str, Any]:
    """The keys of a variant: of the model, and of every mixer. A key of several mixers accepts the values of each."""
    used = [mixer for model in study.variants.values() if isinstance(model, ModelConfig) for mixer in model.mixers]
    mixers = {mixer_class(name) for name in mixer_names()} | {type(mixer) for mixer in used}
    classes: list[type[Config]] = [ModelConfig, ConstructionConfig, *sorted(mixers, key=lambda cls: cls.__module__)]
    accepted: dict[str, list[Any]] = {}
    for cls in classes:
        for key, schema in _properties(cls).items():
            alternatives = accepted.setdefault(key, [])
            if schema not in alternatives:
                alternatives.append(schema)
    properties = {
        key: alternatives[0] if len(alternatives) == 1 else {"anyOf": alternatives} for key, alternatives in accepted.items()
    }
    names = {"anyOf": [{"enum": [*mixer_names(), CONSTRUCTION]}, {"type": "string", "pattern": r"\."}, _ENTRY]}
    properties["mixer"] = {"anyOf": [*names["anyOf"], {"type": "array", "items": names, "minItems": 1}]}
    properties["position"] = {"enum": [*POSITIONS]}
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _training() -> dict[str, Any]:
    return {"type": "object", "properties": _properties(CellTraining), "additionalProperties": False}


def _properties(cls: type[Config]) -> dict[str, Any]:
    """Key -> schema without its default, for the keys that a file can have."""
    properties = cls.model_json_schema(mode="validation")["properties"]
    keys = MODEL_KEYS if cls is ModelConfig else properties
    return {key: {name: value for name, value in properties[key].items() if name not in ("default", "title")} for key in keys}
