"""The first stage: check params.yaml, write each stage's code digest for DVC, and write the JSON schema for editors."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from tabulate import tabulate

from cat.config import Config, ModelConfig, VariantConfig
from cat.mixers.registry import MODEL_KEYS, ConstructionConfig, HybridConfig
from pipeline.config.code_digest import code_digest
from pipeline.config.errors import ParamsError, config_error, printable
from pipeline.config.grid import cells, shown_variants, variants_on
from pipeline.config.study import Study
from pipeline.config.yaml_file import read_yaml
from pipeline.storage.files import atomic_write, read_json, write_json
from pipeline.storage.paths import HELDOUT, PLAN

SCHEMA = Path("params.schema.json")
_STAGES = Path("dvc.yaml")


def write(study: Study) -> None:
    """Write plan/<stage>/<name>.txt, a stage's dependencies besides data and parameters, and params.schema.json.

    Each file lists the digest of the code that the stage runs, and the defaults of keys that params.yaml leaves out, which DVC
    does not see. An evaluation also lists its variants, and a construction its longest sequence per task.
    """
    texts = {name: f"code {code_digest(modules)}\n" for name, modules in stage_modules(study).items()}
    for variant, model in study.variants.items():
        texts[f"train/{variant}"] += _defaults(model)
        if isinstance(model, ConstructionConfig):
            lengths = {t: section.data.lengths[-1] for t, section in study.tasks.items() if variant in variants_on(study, t)}
            texts[f"train/{variant}"] += "".join(f"{task}: {length} tokens at most\n" for task, length in lengths.items())
    for task, section in study.tasks.items():
        texts[f"generate/{task}"] += _defaults(section.data)
        texts[f"evaluate/{task}"] += "".join(f"{variant}\n" for variant in variants_on(study, task))
    # The figures and tables follow the order of these mappings, which DVC ignores.
    texts["render"] += "".join(f"{name}\n" for name in (*study.tasks, *study.variants, *study.ablations))
    with atomic_write(PLAN) as folder:
        for name, text in texts.items():
            path = folder / f"{name}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    with atomic_write(SCHEMA) as path:
        write_json(path, Study.model_json_schema())


def stage_modules(study: Study) -> dict[str, list[str]]:
    """The entry modules of each stage, by the name of its file in plan/."""
    kinds = {task: f"cat.tasks.{section.data.kind}" for task, section in study.tasks.items()}
    example_variants = {v for a in study.ablations.values() if a.plot == "example" for v in shown_variants(a)}
    modules = {
        "judge": ["pipeline.stages.judge", "pipeline.config.claims", *kinds.values()],
        "render": ["pipeline.stages.render", "pipeline.runtime.determinism", *kinds.values()],
        "publish": ["pipeline.stages.report", "pipeline.tracking.sync"],
    }
    if example_variants:
        models = chain(*(_code_of(study.variants[variant]) for variant in example_variants))
        modules["render"] += ["cat.evaluation.diagnostics", *models]
    for task, kind in kinds.items():
        models = chain(*(_code_of(study.variants[variant]) for variant in variants_on(study, task)))
        modules[f"generate/{task}"] = ["pipeline.stages.generate", kind]
        modules[f"evaluate/{task}"] = ["pipeline.stages.evaluate", "pipeline.config.grid", kind, *models]
    for variant, model in study.variants.items():
        modules[f"train/{variant}"] = ["pipeline.stages.train", *_code_of(model)]
    return modules


def _defaults(config: Config) -> str:
    """Keys that params.yaml leaves to their defaults, one line each. A default of None or False adds no line.

    So a new optional key leaves the other cells unchanged.
    """
    content = config.model_dump(mode="json", exclude=config.model_fields_set)
    lines = [f"{key}: {value}\n" for key, value in content.items() if value not in (None, False)]
    if isinstance(config, HybridConfig):
        for index, block in enumerate(config.blocks):
            defaults = block.model_dump(mode="json", exclude=block.model_fields_set | set(MODEL_KEYS))
            lines += [f"blocks.{index}.{key}: {value}\n" for key, value in defaults.items() if value not in (None, False)]
    return "".join(lines)


def _code_of(model: VariantConfig) -> list[str]:
    if isinstance(model, ConstructionConfig):
        return ["cat.theory", "cat.mixers.attention.layer"]
    assert isinstance(model, ModelConfig)
    return [f"cat.mixers.{mixer.mixer}.layer" for mixer in model.mixers]


def check_stages(study: Study, file: str = "params.yaml") -> None:
    """Raise ParamsError unless dvc.yaml has exactly one train stage per ablation with tasks and variants."""
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
        f"ablations.{name}: is missing, and dvc.yaml has a stage train_{name}; empty lists of tasks and variants switch it off"
        for name in sorted(trained.keys() - study.ablations.keys())
    ]
    if faults:
        raise config_error(file, faults)


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


def table(study: Study) -> str:
    """The grid as text: one row per variant, one column per task; each cell has seeds x learning rates x maximum steps."""
    trained = {(cell.task, cell.variant) for cell in cells(study)}
    size = {task: (len(study.seeds), len(s.training.learning_rates), s.training.steps) for task, s in study.tasks.items()}
    constructions = {variant for variant, model in study.variants.items() if isinstance(model, ConstructionConfig)}

    def text(task: str, variant: str) -> str:
        if (task, variant) not in trained:
            return "-"
        return "not trained" if variant in constructions else " x ".join(map(str, size[task]))

    rows = [[variant, *(text(task, variant) for task in study.tasks)] for variant in study.variants]
    steps = sum(math.prod(size[task]) for task, variant in trained if variant not in constructions)
    return (
        tabulate(rows, headers=["variant", *study.tasks])
        + f"\n\n{len(trained)} cells, each with seeds x learning rates x steps at most; {steps:,} steps in all"
        + "".join(
            f"\n{task} trains on sequences of {', '.join(map(str, lengths[:-1]))} and {lengths[-1]} tokens, one length per batch"
            for task, section in study.tasks.items()
            if len(lengths := section.data.training_lengths) > 1
        )
    )
