"""What the tasks and variants of a study are, for readers of the report who do not know their names."""

from __future__ import annotations

import inspect
from importlib import import_module

import pandas as pd

from cat.config import ModelConfig
from cat.tasks.registry import module_of
from pipeline.config.grid import cells, variants_on
from pipeline.config.study import Study
from pipeline.config.yaml_file import to_yaml
from pipeline.reporting.families import FAMILIES, family
from pipeline.reporting.labels import task_label, variant_label, with_slug
from pipeline.reporting.markdown import escape

_NAMES = (
    "`CAT-QK` is attention with a convolution on queries and keys. A name says what differs from one layer of each mixer, with"
    " one head, kernels of size 4, no position encoding and QK-norm. It leaves out what all mixers of the study share. The word"
    " in brackets is the name in params.yaml."
)


def glossary(study: Study) -> str:
    """Markdown: a table of the tasks, a description of each kind of task, and a table of the variants."""
    kinds = dict.fromkeys(section.data.kind for task, section in study.tasks.items() if variants_on(study, task))
    about = "\n\n".join(f"**{kind}**: {_about(kind)}" for kind in kinds)
    variants = _variants(study).to_markdown(index=False, disable_numparse=True)
    return "\n\n".join(
        [
            _tasks(study).to_markdown(index=False, disable_numparse=True),
            f"<details><summary>What a sequence of each kind of task is</summary>\n\n{about}\n\n</details>",
            _NAMES,
            f"<details><summary>{len(study.variants)} variants</summary>\n\n{variants}\n\n</details>",
        ]
    )


def _tasks(study: Study) -> pd.DataFrame:
    rows = []
    for task, section in study.tasks.items():
        data, trained = section.data, [study.training[task, variant] for variant in variants_on(study, task)]
        if trained:
            rates = sorted({rate for settings in trained for rate in settings.learning_rates})
            rows.append(
                {
                    "task": with_slug(task_label(study, task), task),
                    "kind": data.kind,
                    "training length": ", ".join(map(str, data.training_lengths)),
                    "longest test": f"{data.lengths[-1]:,} ({data.multiples[-1]:g}x)",
                    "training steps": ", ".join(f"{steps:,}" for steps in sorted({settings.steps for settings in trained})),
                    "learning rates": ", ".join(f"{rate:g}" for rate in rates),
                }
            )
    return pd.DataFrame(rows)


def _about(kind: str) -> str:
    """The start of the documentation of a kind of task, up to its first example of a sequence."""
    paragraphs = (inspect.getdoc(import_module(module_of(kind))) or "").split("\n\n")
    example = next((index for index, text in enumerate(paragraphs) if text.startswith("    ")), 0)
    return "\n\n".join(text if text.startswith("    ") else escape(text) for text in paragraphs[: example + 1])


def _variants(study: Study) -> pd.DataFrame:
    trained = {cell.variant for cell in cells(study)}
    rows = [
        {
            "variant": with_slug(variant_label(study, variant), variant),
            "family": FAMILIES[family(model)],
            "model": f"`{to_yaml(_settings(model))}`" if isinstance(model, ModelConfig) else "weights set by hand",
        }
        for variant, model in study.variants.items()
        if variant in trained
    ]
    return pd.DataFrame(rows)


def _settings(model: ModelConfig) -> dict[str, object]:
    """The keys of a model that differ from their defaults."""
    mixers = [{"mixer": mixer.mixer, **mixer.model_dump(mode="json", exclude_defaults=True)} for mixer in model.mixers]
    return {**model.model_dump(mode="json", exclude_defaults=True, exclude={"mixers"}), "mixers": mixers}
