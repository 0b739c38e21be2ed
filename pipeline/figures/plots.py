"""The figures of the study, each drawn from the one results table; an ablation names the kind of its own."""

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
from pipeline.figures.stability import by_rate
from pipeline.figures.style import Draw
from pipeline.figures.sweep import sweep
from pipeline.figures.training import training


def figures_of(name: str, ablation: Ablation) -> dict[str, Draw]:
    """The figures of an ablation by the names of their files: its own, by length, and in training."""
    own: dict[str, Draw] = {
        "heatmap": heatmap,
        "sweep": sweep,
        "contrast": contrast,
        "lines": lengths,
        "attention": attention,
        "learning_rates": learning_rates,
        "stability": by_rate,
        "example": example,
        "filters": filters,
        "positions": positions,
        "recall": recall,
    }
    figures = {name: own[ablation.plot]}
    if ablation.shows_models:
        return figures
    if ablation.plot != "lines":
        figures[f"{name}_length"] = lengths
    return {**figures, f"{name}_training": training}
