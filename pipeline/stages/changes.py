"""What changed in params.yaml and in the code since each stage ran. It compares dvc.lock with a plan that is not written."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.config.code_digest import ROOT, is_own, modules_reached, source_file
from pipeline.config.grid import Cell, cells
from pipeline.config.study import Study
from pipeline.config.yaml_file import read_yaml, to_yaml
from pipeline.stages.plan import MODULES, stage_files, stage_modules
from pipeline.storage import runs
from pipeline.storage.files import read_json
from pipeline.storage.paths import PLAN
from pipeline.storage.training_log import training_seconds

PARAMS, LOCK, CACHE = Path("params.yaml"), Path("dvc.lock"), Path(".dvc/cache/files/md5")
NEW = "new"
"""The reason for a stage that never ran."""
NAMED = 6
"""At most this many variants are named in a line."""


class Plan(NamedTuple):
    """The plan of the study as it is now."""

    texts: dict[str, str]
    """Path of each file in plan/ -> its text."""
    reasons: dict[str, list[str]]
    """Path -> changes since the stage that depends on it ran; only changed files."""
    changed_data: list[str]
    """The tasks whose data have other settings or other code than when they were generated."""

    @property
    def digests(self) -> dict[str, str]:
        """Path -> MD5, as in dvc.lock."""
        return {path: md5(text) for path, text in self.texts.items()}


def train_stage(cell: Cell) -> str:
    """The name of the stage that trains the cell."""
    return f"train_{cell.ablation}@{cell.task}-{cell.variant}"


def plan_of(study: Study) -> Plan:
    """Compare the plan of the study with that of the stages in dvc.lock."""
    texts = {f"{PLAN}/{name}": text for name, text in stage_files(study).items()}
    stages = _lock()
    recorded = _recorded(study, stages)
    modules = stage_modules(study)
    changed = _changed_modules(texts[f"{PLAN}/{MODULES}"])
    reasons: dict[str, list[str]] = {}
    for path, text in texts.items():
        if path == f"{PLAN}/{MODULES}" or (digest := recorded.get(path, "")) == md5(text):
            continue
        name = path.removeprefix(f"{PLAN}/").rpartition(".")[0]
        name = re.sub("^train/.*/", "train/", name)
        reasons[path] = list(_reasons(_old_text(path, digest), text, modules[name], changed)) if digest else [NEW]
    written = read_yaml(PARAMS)
    changed_data = [
        task
        for task in study.tasks
        if f"{PLAN}/generate/{task}.txt" in reasons
        or stages.get(f"generate@{task}", {}).get("params", {}).get(str(PARAMS))
        != {"data_seed": written.get("data_seed"), f"tasks.{task}.data": written["tasks"][task]["data"]}
    ]
    return Plan(texts, reasons, changed_data)


def _lock() -> dict[str, dict[str, Any]]:
    """The stages of dvc.lock; none if it cannot be understood, which DVC will say."""
    raw = read_yaml(LOCK) if LOCK.exists() else None
    stages = raw.get("stages") if isinstance(raw, dict) else None
    return {name: stage for name, stage in stages.items() if isinstance(stage, dict)} if isinstance(stages, dict) else {}


def _recorded(study: Study, stages: Mapping[str, dict[str, Any]]) -> dict[str, str]:
    """Path of each file in plan/ -> its MD5 when the stage that depends on it ran."""
    names = {train_stage(cell) for cell in cells(study)}
    return {
        dep["path"]: dep.get("md5", "")
        for name, stage in stages.items()
        if not name.startswith("train_") or name in names
        for dep in stage.get("deps", ())
        if dep["path"].startswith(f"{PLAN}/")
    }


def _old_text(path: str, digest: str) -> str | None:
    """The text of a file in plan/ from this folder or from DVC's cache."""
    for candidate in (Path(path), CACHE / digest[:2] / digest[2:]):
        if candidate.is_file() and md5(text := candidate.read_text(encoding="utf-8")) == digest:
            return text
    return None


def _reasons(old: str | None, new: str, modules: Iterable[str], changed: set[str]) -> Iterator[str]:
    if old is None:
        yield "settings or code"
        return
    before, after = _entries(old), _entries(new)
    for key in {**before, **after}:
        if before.get(key) == after.get(key):
            continue
        if key == "code":
            files = sorted(_file(module) for module in changed & modules_reached(modules))
            yield f"code of {', '.join(files)}" if files else "code"
        else:
            yield f"{key} {_shown(before, key)} -> {_shown(after, key)}"


def _file(module: str) -> str:
    path = source_file(module)
    return str(path if is_own(module) else path.relative_to(ROOT))


def _shown(values: Mapping[str, Any], key: str) -> str:
    return to_yaml(values[key]) if key in values else "-"


def _entries(text: str) -> dict[str, Any]:
    """The entries of a file in plan/, with dotted keys."""
    if text.startswith("{"):
        return dict(_flat(json.loads(text)))
    pairs = (line.partition(": " if ": " in line else " ") for line in text.splitlines())
    return {key: value for key, _, value in pairs}


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted keys of a mapping. Of several mixers, each has its index as key; one mixer has the keys of the model."""
    if isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value):
        path, value = (path, dict(enumerate(value))) if len(value) > 1 else (path.rpartition(".")[0], value[0])
    if isinstance(value, dict) and value:
        for key, entry in value.items():
            yield from _flat(entry, f"{path}.{key}" if path else key)
    else:
        yield path, value


def _changed_modules(new: str) -> set[str]:
    """The modules whose code differs from that of the last plan in this folder."""
    path = PLAN / MODULES
    old, now = read_json(path) if path.exists() else {}, json.loads(new)
    return {module for module in now if module in old and old[module] != now[module]} | (
        now.keys() - old.keys() if old else set()
    )


def md5(text: str) -> str:
    return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()


def retrained_line(study: Study) -> str:
    """Say which cells `dvc repro` trains because of changed settings or code, and how long that took before."""
    plan, all_cells = plan_of(study), cells(study)
    path = {cell: f"{PLAN}/train/{cell.task}/{cell.variant}.json" for cell in all_cells}
    changed = [cell for cell in all_cells if path[cell] in plan.reasons]
    parts = []
    if changed:
        parts.append(f"{len(changed)} of {len(all_cells)} cells: {_names(changed)}; {_duration(changed)}")
    if others := [cell for cell in all_cells if cell.task in plan.changed_data and cell not in changed]:
        parts.append(f"{len(others)} cells of {', '.join(plan.changed_data)}, if the training data change; {_duration(others)}")
    rest = [cell for cell in all_cells if cell not in changed and cell not in others]
    if missing := [cell for cell in rest if not runs.folder(cell.task, cell.variant).exists()]:
        parts.append(f"{len(missing)} cells that are not in this folder, unless DVC restores them; {_duration(missing)}")
    if not parts:
        return f"nothing to train: settings and code of all {len(all_cells)} cells are those of {LOCK}"
    return "`dvc repro` will train " + "; and ".join(parts)


def _names(chosen: list[Cell]) -> str:
    tasks: dict[str, list[str]] = {}
    for cell in chosen:
        tasks.setdefault(cell.variant, []).append(cell.task)
    named = [f"{variant} on {', '.join(names)}" for variant, names in list(tasks.items())[:NAMED]]
    return "; ".join([*named, *([f"{len(tasks) - NAMED} more variants"] if len(tasks) > NAMED else [])])


def _duration(chosen: list[Cell]) -> str:
    """The measured training time of cells, as far as it is known."""
    times = [training_seconds(cell.task, cell.variant) for cell in chosen]
    known = [seconds for seconds in times if seconds is not None]
    if not known:
        return "how long is not known"
    unknown = f", {len(times) - len(known)} cells not known" if len(known) < len(times) else ""
    return f"about {clock(math.fsum(known))} of training{unknown}"


def clock(seconds: float) -> str:
    """The duration as h:mm:ss."""
    return str(timedelta(seconds=math.ceil(seconds)))
