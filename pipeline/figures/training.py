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

    caption = (
        "Validation score by training step. Look for the step at which a line rises, and for wide bands: seeds differ there. Pale"
        " lines are variants that are no better than a partial strategy in the second half."
    )
    extra_plots: ClassVar = {"length": "lines"}

    def draw(self, study: Study, ablation: Ablation, results: pd.DataFrame, references: pd.DataFrame) -> Figure:
        from pipeline.figures.drawing.axes import label_axes
        from pipeline.figures.drawing.pale import draw_pale, pale_groups
        from pipeline.figures.drawing.style import add_legend, draw_lines, panels_of

        figure, panels = panels_of(shown_tasks(study, ablation))
        histories = {task: _histories(study, ablation, task) for task in panels}
        of_training = references[references["multiple"] == 1].groupby("task")["value"].max()
        groups: dict[str, list[list[str]]] = {}
        for task, history in histories.items():
            known = task in of_training and study.tasks[task].data.goal == "accuracy"
            late = history[history["step"] >= history["step"].max() / 2]  # curves that end alike may rise at different steps
            groups[task] = pale_groups(late, float(of_training[task]), x="step") if known else []
        for task, axes in panels.items():
            pale = draw_pale(study, groups, task, histories[task], axes, x="step")
            draw_lines(study, ablation, histories[task], axes, x="step", y="value", markers=False, without=pale)
            label_axes(study, task, axes, "training steps")
            by_accuracy = study.tasks[task].data.goal == "accuracy"
            axes.set_ylabel("validation accuracy" if by_accuracy else "validation loss, nats per token")
        add_legend(figure, panels)
        return figure


def _histories(study: Study, ablation: Ablation, task: str) -> pd.DataFrame:
    """The validation metric of the variants on a task, with the columns step, variant, seed and value."""
    import pandas as pd

    from pipeline.storage.results import read_history

    column = "valid_accuracy" if study.tasks[task].data.goal == "accuracy" else "valid_loss"
    tables = []
    for variant in shown_on(study, ablation, task):
        rate = runs.read_summary(task, variant)["learning_rate"]
        tables.append(read_history(study, task, variant, rate).assign(variant=variant))
    history = pd.concat(tables, ignore_index=True)
    # Seeds that stopped early keep their last value; otherwise the mean over seeds would jump where they end.
    history = history.pivot(index="step", columns=["variant", "seed"], values=column).ffill()
    return history.melt(ignore_index=False, value_name="value").reset_index()
