"""The first stage: check params.yaml, write each stage's code digest for DVC, and write the JSON schema for editors."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from tabulate import tabulate

from cat.config import ModelConfig, VariantConfig
from cat.mixers.registry import CONSTRUCTION, ConstructionConfig, mixer_module
from cat.tasks.registry import module_of
from pipeline.config.code_digest import code_digest, is_installed, is_own, modules_reached, own_digests, source_file
from pipeline.config.errors import ParamsError, config_error, printable
from pipeline.config.grid import seeds_of, shown_tasks, shown_variants, variants_on
from pipeline.config.json_schema import json_schema
from pipeline.config.outputs import figure_plots
from pipeline.config.plots import scored_at_every_rate
from pipeline.config.resolve import resolved, unwritten
from pipeline.config.study import Study
from pipeline.config.yaml_file import read_yaml, to_yaml
from pipeline.storage.files import atomic_write, json_text, read_json, write_json
from pipeline.storage.paths import HELDOUT, PLAN
from pipeline.storage.task_data import overlap_line

SCHEMA = Path("params.schema.json")
MODULES = "modules.json"
"""The file in plan/ that tells which modules changed."""
_STAGES = Path("dvc.yaml")


def write(study: Study) -> None:
    """Write plan/, what each stage depends on besides data, and params.schema.json."""
    with atomic_write(PLAN) as folder:
        for name, text in stage_files(study).items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    with atomic_write(SCHEMA) as path:
        write_json(path, json_schema(study))


def stage_files(study: Study) -> dict[str, str]:
    """The text of each file in plan/, by its path there.

    train/<task>/<variant>.json has all settings of a cell, complete. modules.json has the digest of each module; no stage depends
    on it. The other files have the inputs that DVC does not see: the digest of the code that the stage runs, and defaults of keys
    that are left out.
    """
    modules = stage_modules(study)
    digests = {name: code_digest(modules[name]) for name in modules}
    texts = {f"{name}.txt": f"code {digest}\n" for name, digest in digests.items() if not name.startswith("train/")}
    for task, variant in study.training:
        texts[f"train/{task}/{variant}.json"] = json_text(cell_plan(study, task, variant, digests[f"train/{variant}"]))
    for task, section in study.tasks.items():
        texts[f"generate/{task}.txt"] += "".join(f"{key}: {value}\n" for key, value in unwritten(section.data).items())
        texts[f"evaluate/{task}.txt"] += "".join(
            f"{variant}: {', '.join(map(str, seeds_of(study, task, variant)))}\n" for variant in variants_on(study, task)
        )
        texts[f"evaluate/{task}.txt"] += "".join(f"every rate: {name}\n" for name in scored_at_every_rate(study, task))
    texts[MODULES] = json_text(own_digests(chain(*modules.values())))
    texts["judge.txt"] += f"verdict_seeds_from: {study.verdict_seeds_from}\n"
    # The figures and tables follow the order of these mappings, which DVC ignores.
    texts["render.txt"] += "".join(f"{name}\n" for name in (*study.tasks, *study.variants, *study.ablations))
    return texts


def stage_modules(study: Study) -> dict[str, list[str]]:
    """The entry modules of each stage, by the name of its file in plan/."""
    kinds = {task: module_of(section.data.kind) for task, section in study.tasks.items()}
    plots = {module for modules in _plot_modules(study).values() for module in modules}
    # The figures of cost measure the state of every trained model, and others run the models of their variants.
    run_models = dict.fromkeys(chain(*(_code_of(study.variants[variant]) for _, variant in study.training)))
    modules = {
        "judge": ["pipeline.stages.judge", "pipeline.config.claims", *kinds.values()],
        "render": ["pipeline.stages.render", "pipeline.runtime.determinism", *kinds.values(), *plots, *run_models],
        "publish": ["pipeline.stages.report", "pipeline.tracking.sync", *kinds.values(), *plots, *run_models],
    }
    for task, kind in kinds.items():
        models = chain(*(_code_of(study.variants[variant]) for variant in variants_on(study, task)))
        modules[f"generate/{task}"] = ["pipeline.stages.generate", kind]
        modules[f"evaluate/{task}"] = ["pipeline.stages.evaluate", "pipeline.config.grid", kind, *models]
    for variant, model in study.variants.items():
        modules[f"train/{variant}"] = ["pipeline.stages.train", *_code_of(model)]
    return modules


def _plot_modules(study: Study) -> dict[str, list[str]]:
    """The modules of the plots of each ablation that has a figure."""
    return {
        name: [type(plot).__module__ for plot in figure_plots(name, ablation).values()]
        for name, ablation in study.ablations.items()
        if shown_tasks(study, ablation) and shown_variants(ablation)
    }


def cell_plan(study: Study, task: str, variant: str, code: str) -> dict[str, Any]:
    """Everything that a cell depends on besides its data, complete, wherever it is written in params.yaml."""
    model, training = study.variants[variant], study.training[task, variant]
    common = {"code": code, "precision": study.precision, "deterministic": study.deterministic}
    if isinstance(model, ConstructionConfig):
        longest = study.tasks[task].data.lengths[-1]
        return {**common, "model": _constructed(model), "longest": longest, "training": {"seeds": list(training.seeds)}}
    return {**common, "model": resolved(model), "training": resolved(training)}


def _constructed(model: ConstructionConfig) -> str | dict[str, str]:
    return CONSTRUCTION if model.placement is None else {"mixer": CONSTRUCTION, "placement": model.placement}


def check_planned(study: Study, task: str, variant: str) -> None:
    """Raise ValueError if params.yaml changed a cell since `plan` ran: DVC would record its result for the old settings."""
    path = PLAN / "train" / task / f"{variant}.json"
    planned = read_json(path)
    if planned != cell_plan(study, task, variant, planned["code"]):
        subject = f"params.yaml: has other settings for {variant!r} on {task!r} than when this run began"
        raise ValueError(f"{subject}. Fix: run the command again")


def _code_of(model: VariantConfig) -> list[str]:
    if isinstance(model, ConstructionConfig):
        return ["cat.theory", "cat.mixers.attention.layer"]
    assert isinstance(model, ModelConfig)
    return [mixer_module(mixer.mixer, "layer") for mixer in model.mixers]


def check_stages(study: Study, file: str = "params.yaml") -> None:
    """Raise ParamsError unless dvc.yaml has exactly one train stage per ablation, and depends on the files of your own code."""
    if not _STAGES.exists():
        return
    raw = read_yaml(_STAGES)
    stages = raw.get("stages") if isinstance(raw, dict) else None
    if not isinstance(stages, dict) or not all(isinstance(name, str) for name in stages):
        raise config_error(_STAGES, ["has no mapping of stages"])
    trained = {match[1]: stages[name] for name in stages if (match := re.fullmatch(r"train_(\w+)", name))}
    faults = [
        f"ablations.{name}: the matrix of train_{name} in dvc.yaml must be"
        f" {{task: ${{ablations.{name}.tasks}}, variant: ${{ablations.{name}.variants}}}}"
        for name, stage in trained.items()
        if not isinstance(stage, dict)
        or stage.get("matrix") != {"task": f"${{ablations.{name}.tasks}}", "variant": f"${{ablations.{name}.variants}}"}
    ]
    faults += [
        f"ablations.{name}: dvc.yaml has no stage for it; copy another train_ stage to train_{name} and put {name} in its matrix"
        for name, ablation in study.ablations.items()
        if ablation.tasks and ablation.variants and name not in trained
    ]
    faults += [
        f"ablations.{name}.{key}: is missing, and dvc.yaml has a stage train_{name}; write {key}: [] if it trains nothing"
        for name, ablation in study.ablations.items()
        for key in ("tasks", "variants")
        if name in trained and key not in ablation.model_fields_set
    ]
    faults += [
        f"ablations.{name}: is missing, and dvc.yaml has a stage train_{name}; empty lists of tasks and variants switch it off"
        for name in sorted(trained.keys() - study.ablations.keys() - set(study.switched_off))
    ]
    faults += _own_code_without_dependency(study, stages.get("plan"))
    if faults:
        raise config_error(file, faults)


def _own_code_without_dependency(study: Study, plan: Any) -> Iterator[str]:
    """Yield one line per file of an own task, mixer or plot that the plan does not depend on: DVC would miss its changes."""
    deps = plan.get("deps") if isinstance(plan, dict) else None
    known = {Path(dep) for dep in deps or () if isinstance(dep, str)}
    used = {f"tasks.{name}": [module_of(section.data.kind)] for name, section in study.tasks.items()}
    used |= {f"variants.{name}": _code_of(model) for name, model in study.variants.items()}
    used |= {f"ablations.{name}": modules for name, modules in _plot_modules(study).items()}
    for key, modules in used.items():
        for module in sorted(filter(is_own, modules_reached(filter(is_own, modules)))):
            path = source_file(module)
            if not is_installed(module) and not known & {path, *path.parents}:
                yield f"{key}: the stage plan in dvc.yaml must depend on {path}. Fix: add {path.parts[0]} to its deps"


def changed_sources(study: Study) -> Iterator[str]:
    """Yield one line per task whose source files have changed since `generate`: DVC sees only their path."""
    for name, section in study.tasks.items():
        path = HELDOUT / name / "meta.json"
        if not path.exists():
            continue
        meta, config = read_json(path), section.data.model_dump(mode="json", exclude_defaults=True)
        try:
            changed = meta["config"] == config and meta.get("origin", {}) != section.data.origin()
        except (ValueError, OSError):  # the source is gone; its data are still valid
            continue
        if changed:
            yield (
                f"tasks.{name}.data.source: its files have changed since data/{name} was generated."
                f" Fix: run `dvc repro -f generate@{name}`, then `dvc repro`"
            )


def source_lines(study: Study, file: str = "params.yaml") -> list[str]:
    """Say how each task's local source files are split. Raises ParamsError if some are unusable."""
    lines, faults = [], []
    for name, section in study.tasks.items():
        try:
            lines += [f"tasks.{name}.data.source = {printable(line)}" for line in section.data.report()]
        except (ValueError, OSError) as error:
            faults.append(f"{file}: tasks.{name}.data.source = {printable(str(error))}")
    if faults:
        raise ParamsError(faults)  # not shortened: the names and the fix are at its end
    return lines


def note_lines(study: Study) -> list[str]:
    """What limits the data of each task, in one line each; the overlap of text splits is known once they are generated."""
    lines = []
    for name, section in study.tasks.items():
        lines += [f"tasks.{name}.data: {line}" for line in section.data.notes()]
        if line := overlap_line(name):
            lines.append(f"tasks.{name}.data: {line}")
    return lines


def table(study: Study) -> str:
    """The grid as text: one row per variant, one column per task; each cell has seeds x learning rates x maximum steps."""
    constructions = {variant for variant, model in study.variants.items() if isinstance(model, ConstructionConfig)}
    size = {
        cell: (len(training.seeds), len(training.learning_rates), training.steps)
        for cell, training in study.training.items()
        if cell[1] not in constructions
    }

    def text(task: str, variant: str) -> str:
        if (task, variant) not in study.training:
            return "-"
        return "not trained" if variant in constructions else " x ".join(map(str, size[task, variant]))

    rows = [[variant, *(text(task, variant) for task in study.tasks)] for variant in study.variants]
    steps = sum(map(math.prod, size.values()))
    return (
        tabulate(rows, headers=["variant", *study.tasks])
        + f"\n\n{len(study.training)} cells, each with seeds x learning rates x steps at most; {steps:,} steps in all"
        + "".join(
            f"\n{task} trains on sequences of {', '.join(map(str, lengths[:-1]))} and {lengths[-1]} tokens, one length per batch"
            for task, section in study.tasks.items()
            if len(lengths := section.data.training_lengths) > 1
        )
    )


def _all_values(model: VariantConfig) -> dict[str, Any]:
    if not isinstance(model, ModelConfig):
        assert isinstance(model, ConstructionConfig)
        return {"mixer": CONSTRUCTION, "placement": model.placement}
    mixers = [{"mixer": mixer.mixer, **mixer.model_dump(mode="json", exclude={"mixer"})} for mixer in model.mixers]
    return {**model.model_dump(mode="json"), "mixers": mixers}


def resolved_text(study: Study) -> str:
    """The complete configuration of every variant and cell, as YAML."""
    models = {name: _all_values(model) for name, model in study.variants.items()}
    training: dict[str, dict[str, Any]] = {task: {} for task in study.tasks}
    for (task, variant), settings in study.training.items():
        training[task][variant] = settings.model_dump(mode="json")
    data = {task: section.data.model_dump(mode="json") for task, section in study.tasks.items()}
    sections = {"variants": models, "tasks": data, "training": training}
    lines = []
    for section, entries in sections.items():
        lines.append(f"{section}:")
        for name, entry in entries.items():
            if section == "training":
                lines += [f"  {name}:", *(f"    {variant}: {to_yaml(settings)}" for variant, settings in entry.items())]
            else:
                lines.append(f"  {name}: {to_yaml(entry)}")
    return "\n".join(lines)
