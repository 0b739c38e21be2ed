"""Attention on one test sequence."""

from __future__ import annotations

from collections.abc import Iterable

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from cat.tasks.registry import Recall
from pipeline.config.grid import shown_cells
from pipeline.config.study import Ablation, Study
from pipeline.figures.example import attention_on, read_example


def example(study: Study, ablation: Ablation, results: pd.DataFrame) -> Figure:
    """Where every question of one test sequence looks, a panel a variant; the token that holds the answer has a frame.

    Of the first seed that did not diverge; of a model with several layers and heads, where most is on the answers.
    """
    cells = shown_cells(study, ablation)
    figure, panels = plt.subplots(len(cells), 1, figsize=(11, 2.3 * len(cells)), squeeze=False, layout="constrained")
    for (task, variant), axes in zip(cells, panels[:, 0], strict=True):
        data = read_example(task)
        weights = attention_on(task, variant, study.seeds, data)
        title = f"{variant} on {task}"
        if weights is not None:
            rows = np.arange(len(weights))
            sns.heatmap(weights, vmin=0, vmax=1, cmap="Blues", ax=axes, cbar_kws={"label": "attention"})
            for row, source in zip(rows, data.sources, strict=True):
                axes.add_patch(Rectangle((float(source), float(row)), 1, 1, fill=False, edgecolor="C3", lw=1.4))
            title += f": {weights[rows, data.sources].mean():.2f} on the answers"
        names = _token_names(study, task, data.tokens)
        axes.set_xticks(np.arange(len(names)) + 0.5, names, rotation=90, fontsize=7)
        axes.set_yticks(np.arange(len(data.asked)) + 0.5, [names[at] for at in data.asked], rotation=0, fontsize=7)
        axes.set(title=title if weights is not None else f"{title}: every seed diverged", ylabel="question")
    panels[-1, 0].set_xlabel("what it reads: k, tokens of keys; v, values; a dot, filler")
    return figure


def _token_names(study: Study, task: str, tokens: Iterable[int]) -> list[str]:
    data = study.tasks[task].data
    assert isinstance(data, Recall)

    def name(token: int) -> str:
        if token == 0:
            return "start"
        if token <= data.keys:
            return f"k{token}"
        return f"v{token - data.keys}" if token <= data.keys + data.values else "."

    return [name(token) for token in tokens]
