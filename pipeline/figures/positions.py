"""Bits per byte by position in the context."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, ClassVar

from cat.tasks.text import Text
from pipeline.config.grid import seeds_of, shown_on, shown_tasks, shown_variants
from pipeline.config.plots import Plot
from pipeline.config.study import Ablation, Study
from pipeline.reporting.labels import variant_label

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


class Positions(Plot):
    """One panel per task, the longest test windows.

    Solid: full context from the start of the window. Dashed, from the training length on: a sliding context window.
    """

    caption = "Bits per byte by position in the longest test windows. Dashed: a sliding window of the training length."
    shows_models = True
    extra_plots: ClassVar = {}
    rows = "the rows of these variants"

    def check(self, study: Study, ablation: Ablation) -> Iterator[str]:
        for task in shown_tasks(study, ablation):
            if not isinstance(study.tasks[task].data, Text):
                yield f"plot = {self.name} needs a text task, but task {task!r} is none"

    def sources(self, study: Study, ablation: Ablation) -> list[str]:
        return [f"results/positions/{task}.csv" for task in shown_tasks(study, ablation)]

    def draw(self, study: Study, ablation: Ablation, results: pd.DataFrame, references: pd.DataFrame) -> Figure:
        import seaborn as sns

        from pipeline.figures.drawing.axes import task_title
        from pipeline.figures.drawing.style import add_legend, draw_line, panels_of, set_ticks

        figure, panels = panels_of(shown_tasks(study, ablation))
        # Dashes mark the context here, so the colours alone must tell the variants apart.
        colours = dict(zip(shown_variants(ablation), sns.color_palette("colorblind", len(shown_variants(ablation))), strict=True))
        for task, axes in panels.items():
            table, train_length = _positions(study, ablation, task), study.tasks[task].data.length
            full, sliding = table["context"] == "full", (table["context"] == "sliding") & (table["position"] >= train_length)
            for variant in shown_on(study, ablation, task):
                for in_context, dash in ((full, "-"), (sliding, "--")):
                    rows = table[in_context & (table["variant"] == variant)]
                    if len(rows):  # a diverged seed has no rows
                        draw_line(
                            study, rows, axes, x="position", y="bits_per_byte", color=colours[variant], linestyle=dash,
                            label=variant_label(study, variant) if dash == "-" else None, alpha=0.15,
                        )  # fmt: skip
            axes.set_xscale("log", base=2)
            set_ticks(axes, _doubled(table["position"].min(), table["position"].max()), "{:g}")
            axes.axvline(train_length, color="0.6", lw=1, ls=":", zorder=0)
            axes.set(
                title=task_title(study, task),
                xlabel=f"position (dashed: sliding window of {train_length} tokens)",
                ylabel="bits per byte",
            )
        add_legend(figure, panels)
        return figure

    def tables(self, study: Study, ablation: Ablation, results: pd.DataFrame) -> Iterator[str]:
        from pipeline.reporting.tables import as_markdown, with_labels

        yield as_markdown(with_labels(study, positions_table(study, ablation)))


def _doubled(first: int, last: int) -> Iterable[int]:
    while first <= last:
        yield first
        first *= 2


def positions_table(study: Study, ablation: Ablation) -> pd.DataFrame:
    """Mean bits per byte, per task and variant, of the last bins before the training length and before the longest."""
    import pandas as pd

    rows = []
    for task in shown_tasks(study, ablation):
        train_length, longest = study.tasks[task].data.length, study.tasks[task].data.lengths[-1]
        means = _positions(study, ablation, task).groupby(["variant", "context", "position"])["bits_per_byte"].mean()
        for variant in shown_on(study, ablation, task):
            values = {
                "at the training length": means.get((variant, "full", train_length)),
                "at the longest length": means.get((variant, "full", longest)),
                "at the longest length, sliding window": means.get((variant, "sliding", longest)),
            }
            rows.append({"task": task, "variant": variant, **values})
    return pd.DataFrame(rows)


def _positions(study: Study, ablation: Ablation, task: str) -> pd.DataFrame:
    import pandas as pd

    from pipeline.storage.results import read_positions

    runs = [(variant, seed) for variant in shown_on(study, ablation, task) for seed in seeds_of(study, task, variant)]
    table = read_positions(task)
    return table[pd.MultiIndex.from_frame(table[["variant", "seed"]]).isin(runs)]
