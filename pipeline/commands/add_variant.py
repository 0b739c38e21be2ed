"""Add a variant to params.yaml: a copy of another with some keys changed, and an ablation that trains it.

The file keeps its comments. If each variant and each ablation's list is written on one line, all other lines stay as they are.
Otherwise ruamel.yaml rewrites the file, which may move spaces and line breaks.
"""

from __future__ import annotations

import copy
import difflib
import io
import tempfile
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from ruamel.yaml import YAML, YAMLError
from ruamel.yaml.comments import CommentedMap
from tabulate import tabulate

from pipeline.config.errors import ParamsError, find_entry
from pipeline.config.grid import variant_keys, variant_value
from pipeline.config.load import load_study, study_of
from pipeline.config.names import NAME, PATTERNS, Name
from pipeline.config.study import Study
from pipeline.config.yaml_file import to_yaml
from pipeline.stages.changes import clock
from pipeline.stages.plan import check_stages
from pipeline.storage.files import atomic_write, read_json
from pipeline.storage.training_log import log_path

FILE = Path("params.yaml")


def add_variant(name: str, source: str, settings: tuple[str, ...], *, ablation: str | None = None, dry_run: bool = False) -> str:
    """Add the variant, and describe what `dvc repro` will run; with `dry_run`, show the change of the file instead.

    A setting is `key=value` with a YAML value. It removes the key if the value is null, empty, or `none` where `none` is no
    valid value. The default ablation is the one that trains `source`. Raises ParamsError, and leaves the file as it is, if the
    study would be invalid or the variant is not new.
    """
    study = load_study(FILE)
    _check_name(study, name)
    find_entry(study.variants, "variants", source)
    text = FILE.read_text(encoding="utf-8")
    raw = YAML(typ="safe").load(text)
    config = _apply_settings(study, raw["variants"][source], source, settings)
    _check_new(study, name, raw["variants"] | {name: config}, raw)
    trained_by = _find_ablation(study, source, ablation)
    edited = _edit(text, name, config, source=source, ablation=trained_by)
    _check(edited)
    if dry_run:
        lines = text.splitlines(keepends=True), edited.splitlines(keepends=True)
        message = "".join(difflib.unified_diff(lines[0], lines[1], f"a/{FILE}", f"b/{FILE}"))
    else:
        with atomic_write(FILE.resolve()) as path:  # a link stays: the file is the user's
            path.write_text(edited, encoding="utf-8")
        message = f"{FILE}: added {name}, a copy of {source} with {', '.join(settings)}; ablations.{trained_by} trains it\n"
    return f"{message}\n{_describe_plan(study, name, source, trained_by)}"


def _check_name(study: Study, name: str) -> None:
    try:
        TypeAdapter(Name).validate_python(name)
    except ValidationError:
        raise ParamsError([f"{FILE}: variants: {name!r} {PATTERNS[NAME]}"]) from None
    if name in study.variants:
        raise ParamsError([f"{FILE}: variants.{name}: exists already"])


def _find_ablation(study: Study, source: str, ablation: str | None) -> str:
    if ablation is not None:
        find_entry(study.ablations, "ablations", ablation)
        return ablation
    training = [name for name, candidate in study.ablations.items() if candidate.tasks and source in candidate.variants]
    if len(training) > 1:
        raise ParamsError(
            [f"{FILE}: variants.{source}: the ablations {', '.join(training)} train it. Fix: choose one with --ablation"]
        )
    return training[0]  # load_study refuses a variant that no ablation trains


def _apply_settings(study: Study, config: dict[str, Any], source: str, settings: tuple[str, ...]) -> dict[str, Any]:
    changed, faults, keys = dict(config), [], set()
    inherited = {key: variant_value(study, source, key) for key in variant_keys(study, source)}
    for setting in settings:
        key, equals, text = setting.partition("=")
        try:
            value = YAML(typ="safe").load(text)
        except (YAMLError, ValueError, KeyError):
            faults.append(f"--set {setting!r}: {text!r} is not YAML")
            continue
        if value == "none" and key != "position":
            value = None
        if not (key and equals):
            faults.append(f"--set {setting!r}: is not key=value")
        elif key in keys:
            faults.append(f"--set {setting!r}: sets {key} a second time")
        elif value == config.get(key, inherited.get(key)):
            current = f"no {key}" if value is None else f"{key} = {to_yaml(value)}"
            faults.append(f"--set {setting!r}: changes nothing, variants.{source} has {current}")
        elif value is None and key in config:
            del changed[key]
        else:
            changed[key] = value
        keys.add(key)
    if faults:
        raise ParamsError(faults)
    return changed


def _check_new(study: Study, name: str, written: dict[str, Any], raw: dict[str, Any]) -> None:
    """Raises ParamsError if an existing variant is the same, whatever keys it is written with."""
    model = study_of(raw | {"variants": written}, FILE, check_rules=False).variants[name]
    training = written[name].get("training")
    others = (other for other in study.variants if written[other].get("training") == training)
    if same := next((other for other in others if study.variants[other] == model), None):
        raise ParamsError([f"{FILE}: variants.{name}: is the same as variants.{same}"])


def _edit(text: str, name: str, config: dict[str, Any], *, source: str, ablation: str) -> str:
    """Add the variant as the last, so that no other changes its colour in the figures, and in the ablation's list.

    Raises ParamsError if the edited text is not exactly that study.
    """
    expected = YAML(typ="safe").load(text)
    names = list(expected["ablations"][ablation]["variants"])
    names.insert(names.index(source) + 1 if source in names else len(names), name)
    # New mappings, so that an alias elsewhere in the file does not change too.
    ablations = expected["ablations"] | {ablation: expected["ablations"][ablation] | {"variants": names}}
    expected |= {"variants": expected["variants"] | {name: config}, "ablations": ablations}
    for edit in (_insert_lines, _rewrite):
        try:
            edited = edit(text, name, config, source, ablation, names)
            if YAML(typ="safe").load(edited) == expected:
                return edited
        except (YAMLError, LookupError):
            pass
    raise ParamsError([f"{FILE}: cannot be edited. Fix: add {name}: {to_yaml(config)} by hand"])


def _insert_lines(text: str, name: str, config: dict[str, Any], source: str, ablation: str, names: list[str]) -> str:
    """Insert one line for the variant, and replace one list; the caller checks whether the layout allowed it."""
    study = YAML().load(text)
    lines = text.splitlines(keepends=True)
    row, column = study["ablations"][ablation].lc.value("variants")
    if lines[row][column] != "[":
        return text
    lines[row] = lines[row][:column] + to_yaml(names) + lines[row][column:].partition("]")[2]
    variants = study["variants"].lc
    row, column = variants.key([*study["variants"]][-1])
    lines[row] = lines[row].rstrip("\n") + "\n"
    lines.insert(row + 1, f"{' ' * column}{name}:".ljust(variants.value(source)[1] - 1) + f" {to_yaml(config)}\n")
    return "".join(lines)


def _rewrite(text: str, name: str, config: dict[str, Any], source: str, ablation: str, names: list[str]) -> str:
    """Rewrite the file with its comments."""
    yaml = YAML()
    yaml.preserve_quotes, yaml.width = True, 2**31 - 1
    study = yaml.load(text)
    study["variants"][name] = variant = CommentedMap(config)
    if study["variants"][source].fa.flow_style():
        variant.fa.set_flow_style()
    listed = copy.deepcopy(study["ablations"][ablation]["variants"])  # with its comments; an alias elsewhere stays as it is
    listed.yaml_set_anchor(None)
    listed.insert(names.index(name), name)
    study["ablations"][ablation]["variants"] = listed
    with io.StringIO() as edited:
        yaml.dump(study, edited)
        return edited.getvalue()


def _check(text: str) -> None:
    """Raises ParamsError unless the text is a valid study with a stage in dvc.yaml for each ablation."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, FILE.name)
        path.write_text(text, encoding="utf-8")
        try:
            study = load_study(path)
        except ParamsError as error:
            raise ParamsError([line.replace(str(path), str(FILE), 1) for line in error.lines]) from None
    check_stages(study, str(FILE))


def _describe_plan(study: Study, name: str, source: str, ablation: str) -> str:
    """List the stages that `dvc repro` will run, with the training times of the source's cells."""
    tasks = study.ablations[ablation].tasks
    times = {task: _seconds(task, source) for task in tasks}
    known = [seconds for seconds in times.values() if seconds is not None]
    rows = [
        ("plan", "", ""),
        *(
            (f"train_{ablation}@{task}-{name}", "unknown", f"no time in {log_path(task, source)}")
            if seconds is None
            else (f"train_{ablation}@{task}-{name}", clock(seconds), str(log_path(task, source)))
            for task, seconds in times.items()
        ),
        *((f"evaluate@{task}", "", "") for task in tasks),
        *((stage, "", "") for stage in ("judge", "render", "publish")),
    ]
    title = "`dvc repro` will run, besides stages that are already out of date:"
    if not known:
        stages = "\n".join(stage for stage, *_ in rows)
        return f"{title}\n\n{stages}\n\nno time is known: {source} was not trained in this folder"
    return (
        f"{title}\n\n{tabulate(rows, ['stage', 'h:mm:ss', 'time from'])}\n\n"
        f"about {clock(sum(known))} of training"
        + (f" and {len(tasks) - len(known)} of {len(tasks)} cells unknown" if len(known) < len(tasks) else "")
        + f", if each cell takes as long as that of {source}; starting stages, evaluation and figures take more time"
    )


def _seconds(task: str, variant: str) -> float | None:
    try:
        return float(read_json(log_path(task, variant))["seconds"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
