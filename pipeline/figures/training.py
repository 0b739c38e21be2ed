"""Training curves."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pipeline.config.grid import shown_on, shown_tasks
from pipeline.config.plots import Plot
from pipeline.config.study import Ablation, Study
from pipeline.storage import runs

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


class Training(Plot):
    """The validation metric by training steps, one panel per task."""

    caption = "Validation score by training step."
    extra_plots: ClassVar = {"length": "lines"}

    def draw(self, study: Study, ablation: Ablation, results: pd.DataFrame, references: pd.DataFrame) -> Figure:
        import pandas as pd

        from pipeline.figures.drawing.axes import label_axes
        from pipeline.figures.drawing.style import add_legend, draw_lines, panels_of
        from pipeline.storage.results import read_history

        figure, panels = panels_of(shown_tasks(study, ablation))
        for task, axes in panels.items():
            column = "valid_accuracy" if study.tasks[task].data.goal == "accuracy" else "valid_loss"
            tables = []
            for variant in shown_on(study, ablation, task):
                rate = runs.read_summary(task, variant)["learning_rate"]
                tables.append(read_history(study, task, variant, rate).assign(variant=variant))
            history = pd.concat(tables, ignore_index=True)
            # Seeds that stopped early keep their last value; otherwise the mean over seeds would jump where they end.
            history = history.pivot(index="step", columns=["variant", "seed"], values=column).ffill()
            history = history.melt(ignore_index=False, value_name="value").reset_index()
            draw_lines(study, ablation, history, axes, x="step", y="value", markers=False)
            label_axes(study, task, axes, "training steps")
            axes.set_ylabel("validation accuracy" if column == "valid_accuracy" else "validation loss, nats per token")
        add_legend(figure, panels)
        return figure
