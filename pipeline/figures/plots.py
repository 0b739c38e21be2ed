"""The figures of an ablation, by its `plot` key."""

from __future__ import annotations

from pipeline.config.study import Ablation
from pipeline.figures.attention import attention
from pipeline.figures.by_length import lengths
from pipeline.figures.contrast import contrast
from pipeline.figures.example_plot import example
from pipeline.figures.filters import filters
from pipeline.figures.heatmap import heatmap
from pipeline.figures.learning_rates import learning_rates
from pipeline.figures.positions import positions
from pipeline.figures.recall import recall
from pipeline.figures.stability import stability
from pipeline.figures.style import Draw
from pipeline.figures.sweep import sweep
from pipeline.figures.training import training

PLOTS: dict[str, Draw] = {
    "heatmap": heatmap,
    "sweep": sweep,
    "contrast": contrast,
    "lines": lengths,
    "attention": attention,
    "learning_rates": learning_rates,
    "stability": stability,
    "example": example,
    "filters": filters,
    "positions": positions,
    "recall": recall,
}


def figures_of(name: str, ablation: Ablation) -> dict[str, Draw]:
    """File name -> function of each figure: the ablation's plot, the scores by length, the training curves."""
    figures = {name: PLOTS[ablation.plot]}
    if ablation.shows_models:
        return figures
    if ablation.plot != "lines":
        figures[f"{name}_length"] = lengths
    return {**figures, f"{name}_training": training}
