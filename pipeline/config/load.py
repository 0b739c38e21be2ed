"""Loading params.yaml."""

from __future__ import annotations

from pathlib import Path

from pipeline.config import rules
from pipeline.config.errors import config_error, parse_config
from pipeline.config.study import Study
from pipeline.config.yaml_file import read_yaml


def load_study(path: str | Path = "params.yaml") -> Study:
    """The study of `path`. Raises ParamsError with every fault that it has."""
    return study_of(read_yaml(path), path)


def study_of(raw: object, file: str | Path) -> Study:
    """The study that `raw`, what `file` says, describes. Raises ParamsError with every fault that it has."""
    study: Study = parse_config(Study, raw, file)
    if faults := list(rules.contradictions(study)):
        raise config_error(file, faults)
    return study
