"""Share of seeds that carry over to the longest length, by learning rate and kernel size."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from cat.mixers.attention.config import only_keys_convolved
from cat.tasks.recall import Recall
from pipeline.config.grid import shown_tasks, shown_variants
from pipeline.config.plots import Plot
from pipeline.config.study import Ablation, Study
from pipeline.reporting.labels import variant_label

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


class LearningRates(Plot):
    """One panel per task, one line per variant; dotted lines show the share of seeds that solve the training length."""

    caption = (
        "Share of seeds by learning rate. Dotted: those that solve the training length, 1x, with an accuracy of at least 0.99."
        " With marks: the share of these that also solve the longest test. Below the dotted line at 1, a variant learns the task"
        " but does not carry over."
    )
    scores_every_rate = True
    rows = "the rows of these variants, for every learning rate"

    def check(self, study: Study, ablation: Ablation) -> Iterator[str]:
        for variant in shown_variants(ablation):
            model = study.variants[variant]
            if not only_keys_convolved(model):
                yield (
                    f"plot = {self.name} needs one layer of attention without positions and qk_norm, convolved only by conv_k"
                    f" with one kernel per head; variant {variant!r} differs"
                )
        for task in shown_tasks(study, ablation):
            data = study.tasks[task].data
            if not (isinstance(data, Recall) and data.ngram == 1):
                yield f"plot = {self.name} needs a recall task with ngram = 1, but task {task!r} is none"

    def draw(self, study: Study, ablation: Ablation, results: pd.DataFrame, references: pd.DataFrame) -> Figure:
        from pipeline.figures.drawing.axes import task_title
        from pipeline.figures.drawing.palette import style
        from pipeline.figures.drawing.style import add_legend, panels_of, set_ticks
        from pipeline.reporting.tables import carry_over_table

        table = carry_over_table(study, ablation)
        figure, panels = panels_of(shown_tasks(study, ablation))
        for task, axes in panels.items():
            longest = study.tasks[task].data.multiples[-1]
            for variant, rows in table[table["task"] == task].groupby("variant", sort=False):
                options, label = style(study, str(variant)), variant_label(study, str(variant))
                axes.plot(rows["learning_rate"], rows["share"], label=label, lw=1.8, **options)
                axes.plot(rows["learning_rate"], rows["solves_1x"] / rows["runs"], color=options["color"], ls=":", lw=1.2)
            axes.set_xscale("log")
            set_ticks(axes, sorted(set(table.loc[table["task"] == task, "learning_rate"])), "{:g}")
            note = f"dotted: solve 1x\nmarks: of these, solve {longest:g}x"
            axes.plot([], [], color="0.4", ls=":", lw=1.2, zorder=1, label=note)
            axes.set(
                title=task_title(study, task),
                xlabel="learning rate",
                ylabel="share of seeds",
                ylim=(-0.04, 1.04),
            )
        add_legend(figure, panels)
        return figure

    def sources(self, study: Study, ablation: Ablation) -> list[str]:
        return [f"results/rates/{task}.csv" for task in shown_tasks(study, ablation)]

    def tables(self, study: Study, ablation: Ablation, results: pd.DataFrame) -> Iterator[str]:
        from pipeline.reporting.tables import as_markdown, carry_over_table, prediction_table, with_labels

        yield as_markdown(with_labels(study, carry_over_table(study, ablation)))
        yield (
            "Does the key filter predict it? Runs by whether their key filter meets the condition for every length, and by"
            " whether they carry over.\n\n" + as_markdown(with_labels(study, prediction_table(study, ablation)))
        )
