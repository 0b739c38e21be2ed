"""The figures and tables of what language models do along their context: bits by position, and the gain on recalled answers."""

from __future__ import annotations

from pipeline.config.ablations import shown_variants
from pipeline.config.grid import variants_on
from pipeline.config.study import Ablation, Study


def _shown(study: Study, ablation: Ablation, task: str) -> list[str]:
    return [variant for variant in shown_variants(ablation) if variant in variants_on(study, task)]
