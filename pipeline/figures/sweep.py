"""The metric against a number of the variants."""

from __future__ import annotations

import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from pipeline.config.grid import shown_tasks
from pipeline.config.study import Ablation, Study
from pipeline.figures.common import _label, _limit, trained_variants
from pipeline.figures.style import add_legend, errorbar, panels_of, set_ticks


def sweep(study: Study, ablation: Ablation, results: pd.DataFrame) -> Figure:
    """The metric against a number of the variants, a panel a task, a line a length; `full` stands at the training length."""
    figure, panels = panels_of(shown_tasks(study, ablation))
    assert ablation.x is not None
    for task, axes in panels.items():
        length = study.tasks[task].data.length
        numbers = {v: getattr(study.variants[v], ablation.x) for v in trained_variants(study, ablation)}
        here = results[(results["task"] == task) & results["multiple"].isin(study.evaluate.multiples)].copy()
        _limit(study, here, axes)
        here = here[here["variant"].isin(numbers)]
        here[ablation.x] = here["variant"].map({v: length if n == "full" else n for v, n in numbers.items()}).astype(float)
        here["at length"] = here["multiple"].map(lambda multiple: f"{multiple:g}x")
        sns.lineplot(
            here, x=ablation.x, y="value", hue="at length", style="at length", markers=True, dashes=False, ax=axes,
            palette=sns.color_palette("colorblind", here["at length"].nunique()), errorbar=errorbar(study),
        )  # fmt: skip
        axes.set_xscale("log", base=2)
        set_ticks(axes, sorted(set(here[ablation.x])), "{:g}")
        _label(
            study,
            task,
            axes,
            f"{ablation.x}: taps, the last as many as the sequence has" if "full" in numbers.values() else ablation.x,
        )
    add_legend(figure, panels)
    return figure
