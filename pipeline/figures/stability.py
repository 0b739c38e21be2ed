"""How stable training is, by learning rate: what every run ended at, spikes of its loss, its gradients, its attention."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from pipeline.config.grid import shown_cells, shown_tasks
from pipeline.config.study import Ablation, Study
from pipeline.figures.style import add_legend, draw_lines, set_ticks, style
from pipeline.storage import runs
from pipeline.storage.results import read_history

MEASURES = {
    "valid_loss": "validation loss\nat the end, nats",
    "loss_rise": "largest rise of the loss\nin a step, nats",
    "grad_norm": "largest gradient norm\nafter warm-up",
    "max_logit": "largest\nattention logit",
    "entropy": "entropy of attention\nat the end, nats",
}
"""Of a run, with what they are called in a figure."""
COLUMNS = ("task", "variant", "learning_rate", "seed", "stop", *MEASURES, "entropy_by_head")


def by_rate(study: Study, ablation: Ablation, results: pd.DataFrame) -> Figure:
    """By learning rate, what every run ended at and went through; a row a task, a cross at the top where a seed diverged."""
    tasks = shown_tasks(study, ablation)
    table = stability(study, ablation)
    figure, grid = plt.subplots(
        len(tasks), len(MEASURES), squeeze=False, figsize=(3.4 * len(MEASURES), 3.6 * len(tasks)), layout="constrained"
    )
    for task, row in zip(tasks, grid, strict=True):
        here = table[table["task"] == task]
        for (measure, label), axes in zip(MEASURES.items(), row, strict=True):
            draw_lines(study, ablation, here, axes, x="learning_rate", y=measure)
            if measure == "grad_norm" and here[measure].gt(0).any():
                axes.set_yscale("log")
            for variant, lost in here[here["stop"] == "diverged"].groupby("variant"):
                at = lost["learning_rate"].drop_duplicates()
                colour = style(study, str(variant))["color"]
                axes.plot(at, [1.0] * len(at), "x", color=colour, transform=axes.get_xaxis_transform(), clip_on=False, mew=2)
            axes.set_xscale("log")
            set_ticks(axes, study.tasks[task].training.learning_rates, "{:g}")
            axes.set(title=label, xlabel="learning rate", ylabel=task if axes is row[0] else "")
    add_legend(figure, {str(place): axes for place, axes in enumerate(grid.flat)})
    return figure


def every_run(study: Study) -> pd.DataFrame:
    """The `stability` of all questions whose figure it is, each run once."""
    asked = [ablation for ablation in study.ablations.values() if ablation.plot == "stability"]
    return pd.DataFrame([row for ablation in asked for row in _rows(study, ablation)], columns=COLUMNS).drop_duplicates()


def stability(study: Study, ablation: Ablation) -> pd.DataFrame:
    """A row a run of the variants in a figure. A run that diverged has no loss and no entropy; what has no softmax, no logits.

    `loss_rise` is how far the loss of one step stood above the lowest mean between two looks before it. `entropy_by_head` has the
    heads of a layer apart by spaces, the layers by semicolons.
    """
    return pd.DataFrame(_rows(study, ablation), columns=COLUMNS)


def _rows(study: Study, ablation: Ablation) -> Iterator[dict[str, Any]]:
    shown = shown_cells(study, ablation)
    for task, variant in shown:
        history = read_history(study, task, variant)
        after = study.optimizer.warmup * study.tasks[task].training.steps
        for run in runs.read_summary(task, variant)["runs"]:
            if run["seed"] in study.seeds:
                own = history[(history["learning_rate"] == run["learning_rate"]) & (history["seed"] == run["seed"])]
                yield {"task": task, "variant": variant, **_of_run(run, own, after)}


def _of_run(run: dict[str, Any], history: pd.DataFrame, after: float) -> dict[str, Any]:
    lowest = history["train_loss"].cummin().shift()
    layers = [heads for heads in run["attention_entropy"] or () if heads is not None]
    entropies = [entropy for heads in layers for entropy in heads]
    return {
        "learning_rate": run["learning_rate"],
        "seed": run["seed"],
        "stop": run["stop"],
        "valid_loss": run["valid_loss"],
        "loss_rise": max((history["max_loss"] - lowest).max(), 0.0),
        "grad_norm": history.loc[history["step"] > after, "grad_norm"].max(),
        "max_logit": history["max_logit"].max(),
        "entropy": sum(entropies) / len(entropies) if entropies else math.nan,
        "entropy_by_head": "; ".join(" ".join(f"{entropy:.3f}" for entropy in heads) for heads in layers),
    }
