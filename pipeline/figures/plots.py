"""The figures of an ablation, by kind of plot."""

from __future__ import annotations

from pipeline.config.outputs import figure_plots
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
    "training": training,
}


def figures_of(name: str, ablation: Ablation) -> dict[str, Draw]:
    """File name -> function of each figure of an ablation."""
    return {file: PLOTS[plot] for file, plot in figure_plots(name, ablation).items()}
