"""Trained kernels, compared with those of the construction."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any, ClassVar

from cat.config import ModelConfig
from cat.mixers.registry import ConstructionConfig
from pipeline.config.grid import seeds_of, shown_tasks, shown_variants
from pipeline.config.plots import Plot
from pipeline.config.study import Ablation, Study
from pipeline.figures.base import trained_variants
from pipeline.reporting.labels import variant_label

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

MAX_LAGS = 16
"""Lags shown of a long kernel."""


class Filters(Plot):
    """Kernel values as stems: one row per task and variant, one column per projection.

    Each kernel is divided by its largest value, because attention is invariant to its scale.
    """

    caption = (
        "Trained kernels and those of the construction, each divided by its largest value. Compare the dots, one stem per seed,"
        " with the crosses of the construction: at the same lag, training finds the same kernel."
    )
    shows_models = True
    extra_plots: ClassVar = {}
    rows = "the rows of these variants"

    def check(self, study: Study, ablation: Ablation) -> Iterator[str]:
        for variant in trained_variants(study, ablation):
            model = study.variants[variant]
            if isinstance(model, ModelConfig) and not any(mixer.has_convolution for mixer in model.mixers):
                yield f"plot = {self.name} needs a convolution, but variant {variant!r} has none"

    def sources(self, study: Study, ablation: Ablation) -> list[str]:
        return [f"results/filters/{task}.csv" for task in shown_tasks(study, ablation)]

    def draw(self, study: Study, ablation: Ablation, results: pd.DataFrame, references: pd.DataFrame) -> Figure:
        import matplotlib.pyplot as plt
        import pandas as pd

        from pipeline.figures.drawing.axes import task_title
        from pipeline.figures.drawing.palette import style
        from pipeline.figures.drawing.style import add_legend, set_ticks
        from pipeline.storage.results import read_filters

        tables = {task: read_filters(task) for task in shown_tasks(study, ablation)}
        cells = [(t, v) for t in tables for v in trained_variants(study, ablation) if v in set(tables[t]["variant"])]
        constructions = [v for v in shown_variants(ablation) if isinstance(study.variants[v], ConstructionConfig)]
        rows = max(len(cells), 1)
        figure, grid = plt.subplots(
            rows, 3, figsize=(11.5, 2.3 * rows), squeeze=False, sharex=True, sharey=True, layout="constrained"
        )
        panels: dict[str, Axes] = {}
        for (task, variant), row in zip(cells, grid, strict=bool(cells)):
            for projection, axes in zip(("q", "k", "v"), row, strict=True):
                kernels = tables[task][(tables[task]["projection"] == projection) & (tables[task]["lag"] < MAX_LAGS)]
                trained = kernels[(kernels["variant"] == variant) & kernels["seed"].isin(seeds_of(study, task, variant))]
                if not len(trained):
                    continue
                panels[f"{task} {variant} {projection}"] = axes
                first_seeds = {v: seeds_of(study, task, v)[0] for v in constructions}  # all seeds have the same weights
                constructed = kernels[kernels["variant"].map(first_seeds) == kernels["seed"]]
                _draw_stems(axes, constructed, -0.15, color="black", marker="x", linestyle=":", label="construction")
                color = style(study, variant)["color"]
                _draw_stems(axes, trained, 0.1, color=color, marker="o", linestyle="-", label="trained, each seed")
                axes.axhline(0, color="0.5", lw=0.8)
                title = f"{variant_label(study, variant)}: {projection.upper()}"
                axes.set_title(title if len(tables) == 1 else f"{title}\n{task_title(study, task)}", fontsize="small")
        if not cells:
            figure.suptitle("no trained kernel: every seed diverged")
        elif len(tables) == 1:
            figure.suptitle(task_title(study, next(iter(tables))), fontsize="medium")
        lags = pd.concat([table["lag"] for table in tables.values()])
        set_ticks(grid[0, 0], range(max(lags[lags < MAX_LAGS].max(), 1) + 1 if len(lags) else 2), "{:g}")
        _label_outer(grid, panels.values())
        add_legend(figure, panels)
        return figure


def _label_outer(grid: NDArray[Any], panels: Collection[Axes]) -> None:
    """Remove the panels that are not used, and label the axes of the first of each row and the last of each column."""
    for axes in grid.flat:
        if axes not in panels:
            axes.remove()
    for row in grid:
        for axes in [axes for axes in row if axes in panels][:1]:
            axes.set_ylabel("kernel value\n/ largest value")
            axes.tick_params(labelleft=True)
    for column in grid.T:
        for axes in [axes for axes in column if axes in panels][-1:]:
            axes.set_xlabel("lag, tokens")
            axes.tick_params(labelbottom=True)


def _draw_stems(axes: Axes, table: pd.DataFrame, shift: float, *, color: Any, marker: str, linestyle: str, label: str) -> None:
    """Draw the kernels of every layer, head and seed, each shifted a little to the right of the previous one."""
    for index, (_, kernel) in enumerate(table.groupby(["variant", "layer", "head", "seed"], sort=True)):
        largest = kernel["value"].iloc[kernel["value"].abs().argmax()]
        heights = kernel["value"] / largest if largest else kernel["value"]
        lags = kernel["lag"] + shift + 0.08 * index
        for x, height in zip(lags, heights, strict=True):
            axes.plot([x, x], [0, height], linestyle, color=color, lw=1.6)
        axes.plot(lags, heights, marker, color=color, ms=5, label=label if index == 0 else None)
