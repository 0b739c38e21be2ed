"""Load and check params.yaml."""

from __future__ import annotations

from pathlib import Path

from pipeline.config import rules
from pipeline.config.errors import config_error, parse_config
from pipeline.config.study import Study
from pipeline.config.yaml_file import read_yaml


def load_study(path: str | Path = "params.yaml") -> Study:
    """Load the study in `path`. Raises ParamsError listing every error."""
    return study_of(read_yaml(path), path)


def study_of(raw: object, file: str | Path) -> Study:
    """Check `raw`, the parsed content of `file`. Raises ParamsError listing every error."""
    study: Study = parse_config(Study, raw, file)
    if errors := list(rules.contradictions(study)):
        raise config_error(file, errors)
    return study
