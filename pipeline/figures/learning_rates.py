"""Share of seeds whose key filter solves every length, by learning rate."""

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
    """One panel per task; dotted lines show the mean validation accuracy."""

    caption = "Share of seeds whose key kernel solves every length, by learning rate. Dotted: validation accuracy."

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
        from pipeline.figures.drawing.style import add_legend, panels_of, set_ticks, style
        from pipeline.reporting.tables import key_filter_table

        table = key_filter_table(study, ablation)
        figure, panels = panels_of(shown_tasks(study, ablation))
        for task, axes in panels.items():
            for variant, rows in table[table["task"] == task].groupby("variant", sort=False):
                options, label = style(study, str(variant)), variant_label(study, str(variant))
                axes.plot(rows["learning rate"], rows["solve every length"] / rows["runs"], label=label, lw=1.8, **options)
                axes.plot(rows["learning rate"], rows["validation accuracy"], color=options["color"], ls=":", lw=1.2)
            axes.set_xscale("log")
            set_ticks(axes, sorted(set(table.loc[table["task"] == task, "learning rate"])), "{:g}")
            axes.set(
                title=task_title(study, task),
                xlabel="learning rate",
                ylabel="share of seeds that solve every length\n(dotted: validation accuracy)",
                ylim=(-0.04, 1.04),
            )
        add_legend(figure, panels)
        return figure

    def tables(self, study: Study, ablation: Ablation, results: pd.DataFrame) -> Iterator[str]:
        from pipeline.reporting.tables import key_filter_table, with_labels

        yield with_labels(study, key_filter_table(study, ablation)).to_markdown(index=False)
