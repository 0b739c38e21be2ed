"""With and without filters, by a setting."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from pipeline.config.grid import shown_tasks
from pipeline.config.study import Ablation, Study
from pipeline.figures.common import _label, _limit, trained_variants
from pipeline.figures.style import add_legend, errorbar


def contrast(study: Study, ablation: Ablation, results: pd.DataFrame) -> Figure:
    """The metric by a setting of the variants, filtered beside unfiltered; a row a task, a column a length."""
    multiples, tasks = study.evaluate.multiples, shown_tasks(study, ablation)
    figure, grid = plt.subplots(
        len(tasks), len(multiples), squeeze=False, figsize=(5.2 * len(multiples), 3.4 * len(tasks)), sharex=True
    )
    assert ablation.x is not None
    settings = {v: str(getattr(study.variants[v], ablation.x)) for v in study.variants if v in trained_variants(study, ablation)}
    for task, row in zip(tasks, grid, strict=True):
        for multiple, axes in zip(multiples, row, strict=True):
            here = results[(results["task"] == task) & (results["multiple"] == multiple)].copy()
            _limit(study, here, axes)
            here = here[here["variant"].isin(settings)]
            here[ablation.x] = here["variant"].map(settings)
            here["filters"] = here["variant"].map(
                {v: "with filters" if study.variants[v].has_convolution else "without" for v in settings}
            )
            sns.pointplot(
                here, x=ablation.x, y="value", order=list(dict.fromkeys(settings.values())), ax=axes, linestyle="none",
                hue="filters", hue_order=["without", "with filters"], palette=sns.color_palette("colorblind", 2),
                markers=["o", "s"], dodge=0.3, errorbar=errorbar(study),
            )  # fmt: skip
            _label(study, task, axes, ablation.x)
            axes.set_title(f"{task}, at {multiple:g}x the training length")
    panels = {str(i): axes for i, axes in enumerate(grid.flat)}
    figure.tight_layout()
    add_legend(figure, panels)
    return figure
