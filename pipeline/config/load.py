"""Load and check params.yaml."""

from __future__ import annotations

from pathlib import Path

from pipeline.config import rules
from pipeline.config.errors import ParamsError, config_error, parse_config
from pipeline.config.resolve import complete, variant_errors
from pipeline.config.study import Study, StudyFile
from pipeline.config.yaml_file import read_yaml

SWITCHED_OFF: dict[str, list[str]] = {"tasks": [], "variants": []}
"""An ablation of dvc.yaml that the study does not have: DVC needs the lists."""


def load_study(path: str | Path = "params.yaml") -> Study:
    """Load the study in `path`. Raises ParamsError listing every error."""
    return study_of(read_yaml(path), path)


def study_of(raw: object, file: str | Path, *, check_rules: bool = True) -> Study:
    """Check `raw`, the parsed content of `file`, and complete it. Raises ParamsError listing every error.

    Without `check_rules`, the sections may contradict each other.
    """
    raw, switched_off = without_switched_off(raw)
    try:
        written: StudyFile = parse_config(StudyFile, raw, file)
    except ParamsError as error:
        raise ParamsError([*error.lines, *config_error(file, variant_errors(raw)).lines]) from None
    study = complete(written, file, switched_off)
    if check_rules and (errors := list(rules.contradictions(study))):
        raise config_error(file, errors)
    return study


def without_switched_off(raw: object) -> tuple[object, tuple[str, ...]]:
    """Split the ablations that are switched off from the content of a file."""
    if not isinstance(raw, dict) or not isinstance(raw.get("ablations"), dict):
        return raw, ()
    off = tuple(name for name, ablation in raw["ablations"].items() if ablation == SWITCHED_OFF)
    return {**raw, "ablations": {name: ablation for name, ablation in raw["ablations"].items() if name not in off}}, off
