"""Mean scores over seeds by variant and task, one table per metric and length."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from pipeline.config.grid import shown_tasks, shown_variants
from pipeline.config.study import Ablation, Study
from pipeline.storage.tables import PRIMARY


def mean_scores(study: Study, ablation: Ablation, results: pd.DataFrame) -> Iterator[tuple[str, float, pd.DataFrame]]:
    """Yield metric, length as a multiple, and mean scores, variants by tasks, for each length that has scores."""
    for goal, metric in PRIMARY.items():
        tasks = [task for task in shown_tasks(study, ablation) if study.tasks[task].data.goal == goal]
        for multiple in study.evaluate.multiples:
            scores = results[results["task"].isin(tasks) & (results["multiple"] == multiple)]
            if len(scores):
                means = scores.pivot_table(index="variant", columns="task", values="value", aggfunc="mean")
                yield metric, multiple, means.reindex(index=shown_variants(ablation), columns=tasks)
