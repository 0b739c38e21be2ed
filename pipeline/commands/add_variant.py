"""A variant more: the line of another in params.yaml with some keys changed, an ablation that trains it, and what that will run.

Text is put in at two places, and all else of the file stays as it is to the byte.
"""

from __future__ import annotations

import difflib
import math
import tempfile
import textwrap
from datetime import timedelta
from pathlib import Path
from typing import Any, get_args

from pydantic import TypeAdapter, ValidationError
from ruamel.yaml import YAML, YAMLError
from ruamel.yaml.nodes import CollectionNode, MappingNode, Node, SequenceNode
from tabulate import tabulate

from cat.config import VariantConfig
from pipeline.config.errors import ParamsError, find_entry, parse_config
from pipeline.config.load import load_study
from pipeline.config.names import NAME, PATTERNS, Name
from pipeline.config.study import Study
from pipeline.config.yaml_file import to_yaml
from pipeline.stages.plan import check_stages
from pipeline.storage.files import atomic_write, read_json
from pipeline.storage.paths import LOGS

FILE = Path("params.yaml")


def add_variant(name: str, source: str, settings: tuple[str, ...], *, ablation: str | None = None, dry_run: bool = False) -> str:
    """Adds the variant, and says what `dvc repro` will run; for `dry_run` writes nothing and shows the change of the file.

    A setting is `key=value`, its value YAML; null, nothing or, where the key has no such value, none take the key out. The
    ablation is by default the one that trains `source`. Raises ParamsError, and leaves the file alone, where the outcome would
    not be a valid study, or would be nothing new.
    """
    study = load_study(FILE)
    _check_name(study, name)
    model = find_entry(study.variants, "variants", source)
    text = FILE.read_bytes().decode()
    raw = YAML(typ="safe").load(text)
    line = _changed(raw["variants"][source], source, model, settings)
    _check_new(study, name, parse_config(Study, raw | {"variants": raw["variants"] | {name: line}}, FILE).variants[name])
    home = _home(study, source, ablation)
    edited = _inserted(text, raw, name, line, source=source, home=home)
    _check(edited)
    if dry_run:
        lines = text.splitlines(keepends=True), edited.splitlines(keepends=True)
        said = "".join(difflib.unified_diff(lines[0], lines[1], f"a/{FILE}", f"b/{FILE}"))
    else:
        with atomic_write(FILE) as path:
            path.write_bytes(edited.encode())
        said = f"{FILE}: {name} is new, from {source} with {', '.join(settings)}; ablations.{home} trains it\n"
    return f"{said}\n{_plan(study, name, source, home)}"


def _check_name(study: Study, name: str) -> None:
    try:
        TypeAdapter(Name).validate_python(name)
    except ValidationError:
        raise ParamsError([f"{FILE}: variants: {name!r} {PATTERNS[NAME]}"]) from None
    if name in study.variants:
        raise ParamsError([f"{FILE}: variants.{name}: is there already"])


def _home(study: Study, source: str, ablation: str | None) -> str:
    """The ablation that is to train the variant."""
    if ablation is not None:
        find_entry(study.ablations, "ablations", ablation)
        return ablation
    training = [name for name, candidate in study.ablations.items() if candidate.tasks and source in candidate.variants]
    if len(training) > 1:
        raise ParamsError(
            [f"{FILE}: variants.{source}: is trained by the ablations {', '.join(training)}; name one with --ablation"]
        )
    return training[0]  # there is one: a variant that none trains is refused


def _changed(line: dict[str, Any], source: str, model: VariantConfig, settings: tuple[str, ...]) -> dict[str, Any]:
    """The `line` of the source with the settings."""
    changed, faults, keys = dict(line), [], set()
    for setting in settings:
        key, equals, text = setting.partition("=")
        try:
            value = YAML(typ="safe").load(text)
        except (YAMLError, ValueError, KeyError):
            faults.append(f"--set {setting!r}: {text!r} is not YAML")
            continue
        field = type(model).model_fields.get(key)
        if value == "none" and not (field and "none" in get_args(field.annotation)):
            value = None
        if not (key and equals):
            faults.append(f"--set {setting!r}: is not key=value")
        elif key in keys:
            faults.append(f"--set {setting!r}: sets {key} a second time")
        elif value == line.get(key):
            has = f"no {key}" if value is None else f"{key} = {to_yaml(value)}"
            faults.append(f"--set {setting!r}: changes nothing, variants.{source} has {has}")
        elif value is None:
            del changed[key]
        else:
            changed[key] = value
        keys.add(key)
    if faults:
        raise ParamsError(faults)
    return changed


def _check_new(study: Study, name: str, model: VariantConfig) -> None:
    """Raises ParamsError where there is a variant like that, whatever keys it is written with."""
    if twin := next((other for other in study.variants if study.variants[other] == model), None):
        raise ParamsError([f"{FILE}: variants.{name}: is the same as variants.{twin}"])


def _inserted(text: str, raw: Any, name: str, line: dict[str, Any], *, source: str, home: str) -> str:
    """The text of a study, `raw` once read, with a `line` for the variant after all others and its name in an ablation's list.

    Last, so that no other changes its colour in the figures. Raises ParamsError where that cannot be done to the text.
    """
    variants, ablations = raw["variants"], raw["ablations"]
    names = list(ablations[home]["variants"])
    place = names.index(source) + 1 if source in names else len(names)
    names.insert(place, name)
    # Built anew, so that what two places of the file share by an alias is not changed in both.
    ablations = ablations | {home: ablations[home] | {"variants": names}}
    expected = raw | {"variants": variants | {name: line}, "ablations": ablations}
    try:
        root = YAML().compose(text)
        edits = [
            _line_of_variant(text, _node(root, "variants"), name, line, source),
            _name_in_list(text, _node(root, "ablations", home, "variants"), name, place),
        ]
        for index, insertion in sorted(edits, reverse=True):
            text = text[:index] + insertion + text[index:]
        if YAML(typ="safe").load(text) == expected:
            return text
    except (YAMLError, KeyError):
        pass
    raise ParamsError(
        [f"{FILE}: variants or ablations.{home}.variants do not have a line each; add {name}: {to_yaml(line)} by hand"]
    )


def _line_of_variant(text: str, variants: MappingNode, name: str, line: dict[str, Any], source: str) -> tuple[int, str]:
    """Where to insert what, in the style of the source and its values below each other."""
    model = _node(variants, source)
    column = model.start_mark.column
    head = " " * variants.value[0][0].start_mark.column + f"{to_yaml(name)}:"
    if model.flow_style:
        return _new_line(text, _end(variants), f"{head.ljust(column - 1)} {to_yaml(line)}")
    return _new_line(text, _end(variants), f"{head}\n{textwrap.indent(to_yaml(line, flow=False), ' ' * column)}")


def _name_in_list(text: str, names: SequenceNode, name: str, place: int) -> tuple[int, str]:
    """Where to insert what."""
    if not names.value:
        return names.start_mark.index + 1, to_yaml(name)
    neighbour = names.value[place - 1]
    start, end = neighbour.start_mark.index, neighbour.end_mark.index
    if names.flow_style:
        return end, f", {to_yaml(name)}"
    return _new_line(text, end, text[text.rfind("\n", 0, start) + 1 : start] + to_yaml(name))


def _new_line(text: str, index: int, line: str) -> tuple[int, str]:
    """`line` as one of its own, after the one that `index` is in."""
    ending = "\r\n" if "\r\n" in text else "\n"
    found = text.find(ending, index)
    return found if found >= 0 else len(text), ending + line.replace("\n", ending)


def _node(node: Node, *path: str) -> Any:
    for step in path:
        node = {key.value: value for key, value in node.value}[step]
    return node


def _end(node: Node) -> int:
    """Where its last character is; the mark of a block's end is after the comments that follow it."""
    while isinstance(node, CollectionNode) and not node.flow_style and node.value:
        last = node.value[-1]
        node = last[1] if isinstance(last, tuple) else last
    return int(node.end_mark.index)


def _check(text: str) -> None:
    """Raises ParamsError unless the text is a study that DVC has the stages of."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, FILE.name)
        path.write_bytes(text.encode())
        try:
            study = load_study(path)
        except ParamsError as error:
            raise ParamsError([line.replace(str(path), str(FILE), 1) for line in error.lines]) from None
    check_stages(study, str(FILE))


def _plan(study: Study, name: str, source: str, home: str) -> str:
    """The stages that the new variant makes `dvc repro` run, and how long the source's cells took."""
    tasks = study.ablations[home].tasks
    took = {task: _seconds(task, source) for task in tasks}
    known = [seconds for seconds in took.values() if seconds is not None]
    rows = [
        ("plan", "", ""),
        *(
            (f"train_{home}@{task}-{name}", "unknown", f"no time in {_log(task, source)}")
            if seconds is None
            else (f"train_{home}@{task}-{name}", _clock(seconds), str(_log(task, source)))
            for task, seconds in took.items()
        ),
        *((f"evaluate@{task}", "", "") for task in tasks),
        *((stage, "", "") for stage in ("judge", "render", "publish")),
    ]
    begins = "`dvc repro` will run, besides what is out of date already:"
    if not known:
        stages = "\n".join(stage for stage, *_ in rows)
        return f"{begins}\n\n{stages}\n\nno time is known: {source} has not been trained here"
    return (
        f"{begins}\n\n{tabulate(rows, ['stage', 'h:mm:ss', 'as in'])}\n\n"
        f"about {_clock(sum(known))} of training"
        + (f" and {len(tasks) - len(known)} of {len(tasks)} cells unknown" if len(known) < len(tasks) else "")
        + f", if a cell takes as long as that of {source} did; starting stages, scoring and drawing come on top"
    )


def _log(task: str, variant: str) -> Path:
    return LOGS / task / f"{variant}.json"


def _seconds(task: str, variant: str) -> float | None:
    try:
        return float(read_json(_log(task, variant))["seconds"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=math.ceil(seconds)))
