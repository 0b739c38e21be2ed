"""The first stage: params.yaml checked as a whole, its grid written for the stages that walk it, its JSON schema for editors."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML, YAMLError
from tabulate import tabulate

from pipeline.files import whole, write_json
from pipeline.grid import cells, variants_on
from pipeline.params import ParamsError, Study

PLAN = Path("plan")
SCHEMA = Path("params.schema.json")
_STAGES = Path("dvc.yaml")


def write(study: Study) -> None:
    """plan/<task>.txt, one variant a line, and params.schema.json, which no parameter changes."""
    with whole(PLAN) as folder:
        folder.mkdir()
        for task in study.tasks:
            (folder / f"{task}.txt").write_text("".join(f"{variant}\n" for variant in variants_on(study, task)))
    with whole(SCHEMA) as path:
        write_json(path, Study.model_json_schema())


def check_stages(study: Study, file: str = "params.yaml") -> None:
    """Raises ParamsError unless dvc.yaml has one train stage for every ablation, and no other.

    A stage must depend on the mixers of its variants, or a change to one of them would not train them again.
    """
    if not _STAGES.exists():
        return
    try:
        stages: Any = YAML(typ="safe").load(_STAGES.read_text(encoding="utf-8"))["stages"]
    except YAMLError as error:
        raise ParamsError([f"{_STAGES}: " + " ".join(str(error).split())]) from None
    except (KeyError, TypeError):
        stages = None
    if not isinstance(stages, dict) or not all(isinstance(name, str) for name in stages):
        raise ParamsError([f"{_STAGES}: has no mapping of stages"])
    trained = {match[1] for name in stages if (match := re.fullmatch(r"train_(\w+)", name))}
    faults = [
        f"ablations.{name}: dvc.yaml has no stage for it; copy another train_ stage to train_{name} and put {name} in its matrix"
        for name in study.ablations
        if name not in trained
    ]
    faults += [
        f"ablations.{name}: is missing, and dvc.yaml has a stage train_{name}; empty lists of tasks and variants switch it off"
        for name in sorted(trained - set(study.ablations))
    ]
    for name in sorted(trained & set(study.ablations)):
        depends = str(stages[f"train_{name}"])
        for mixer in sorted({study.variants[variant].mixer for variant in study.ablations[name].variants}):
            if f"cat/mixers/{mixer}.py" not in depends:
                faults.append(
                    f"ablations.{name}: has variants with mixer {mixer}, and in dvc.yaml the deps of train_{name}"
                    f" lack cat/mixers/{mixer}.py and what it imports from cat"
                )
    if faults:
        raise ParamsError([f"{file}: {fault}" for fault in faults])


def table(study: Study) -> str:
    """The grid as text: a row a variant, a column a task; in a cell its seeds, learning rates and steps at most."""
    here = {(cell.task, cell.variant) for cell in cells(study)}
    size = {task: (len(study.seeds), len(s.train.learning_rates), s.train.steps) for task, s in study.tasks.items()}
    rows = [
        [variant, *(" x ".join(map(str, size[task])) if (task, variant) in here else "-" for task in study.tasks)]
        for variant in study.variants
    ]
    steps = sum(math.prod(size[task]) for task, _ in here)
    return (
        tabulate(rows, headers=["variant", *study.tasks])
        + f"\n\n{len(here)} cells, in each: seeds x learning rates x steps at most; {steps:,} steps in all"
    )
