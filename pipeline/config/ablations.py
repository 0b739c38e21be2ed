"""Which tasks and variants an ablation shows."""

from __future__ import annotations

from pipeline.config.study import Ablation, Study


def shown_tasks(study: Study, ablation: Ablation) -> list[str]:
    """The tasks of the ablation's figure, in the order of `tasks`."""
    return [task for task in study.tasks if task in (*ablation.tasks, *ablation.across)]


def shown_variants(ablation: Ablation) -> list[str]:
    """The variants of the ablation's figure: what stands beside comes first."""
    return [*ablation.beside, *ablation.variants]
