"""Training stability by learning rate: final loss, loss spikes, gradient norms, attention logits and entropy."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pipeline.config.grid import seeds_of, shown_cells, shown_tasks
from pipeline.config.plots import Plot, load_plot
from pipeline.config.study import Ablation, Study
from pipeline.storage import runs

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

MEASURES = {
    "valid_loss": "final validation\nloss, nats",
    "loss_rise": "largest loss rise\nin one step, nats",
    "grad_norm": "largest gradient norm\nafter warm-up",
    "max_logit": "largest\nattention logit",
    "entropy": "final attention\nentropy, nats",
}
"""Measure of a run -> its label in the figure."""
COLUMNS = ("task", "variant", "learning_rate", "seed", "stop", *MEASURES, "entropy_by_head")


class Stability(Plot):
    """One row of panels per task, one column per measure; a cross at the top marks a diverged seed."""

    caption = (
        "Final loss, loss spikes, gradient norms, attention logits and entropy of every run, by learning rate. The learning rates"
        " with low loss and few spikes are the stable ones; a cross at the top marks a diverged run."
    )
    rows = "the rows of these variants, in nats, for every learning rate"

    def check(self, study: Study, ablation: Ablation) -> Iterator[str]:
        for task, variant in shown_cells(study, ablation):
            if len(study.training[task, variant].learning_rates) < 2:
                yield f"plot = {self.name} needs at least two learning rates, but variant {variant!r} has one on task {task!r}"

    def sources(self, study: Study, ablation: Ablation) -> list[str]:
        return ["reports/stability.csv"]

    def draw(self, study: Study, ablation: Ablation, results: pd.DataFrame, references: pd.DataFrame) -> Figure:
        import matplotlib.pyplot as plt

        from pipeline.figures.drawing.axes import task_title
        from pipeline.figures.drawing.palette import style
        from pipeline.figures.drawing.style import add_legend, draw_lines, set_ticks

        tasks = shown_tasks(study, ablation)
        table = stability_table(study, ablation)
        measures = {measure: label for measure, label in MEASURES.items() if table[measure].notna().any()}
        figure, grid = plt.subplots(
            len(tasks), len(measures), squeeze=False, figsize=(3.4 * len(measures), 3.6 * len(tasks)), layout="constrained"
        )
        for task, row in zip(tasks, grid, strict=True):
            of_task = table[table["task"] == task]
            for (measure, label), axes in zip(measures.items(), row, strict=True):
                draw_lines(study, ablation, of_task, axes, x="learning_rate", y=measure)
                if measure == "grad_norm" and of_task[measure].gt(0).any():
                    axes.set_yscale("log")
                for variant, diverged in of_task[of_task["stop"] == "diverged"].groupby("variant"):
                    rates = diverged["learning_rate"].drop_duplicates()
                    crosses = {"color": style(study, str(variant))["color"], "clip_on": False, "mew": 2}
                    axes.plot(rates, [1.0] * len(rates), "x", transform=axes.get_xaxis_transform(), **crosses)
                axes.set_xscale("log")
                set_ticks(axes, sorted(set(of_task["learning_rate"])), "{:g}")
                axes.set(title=label, xlabel="learning rate", ylabel=task_title(study, task) if axes is row[0] else "")
        add_legend(figure, {str(index): axes for index, axes in enumerate(grid.flat)})
        return figure

    def tables(self, study: Study, ablation: Ablation, results: pd.DataFrame) -> Iterator[str]:
        from pipeline.reporting.tables import folded, with_labels

        title = "Every run, with the entropy of each head (layers separated by semicolons)"
        yield folded(title, with_labels(study, stability_table(study, ablation)))


def full_stability_table(study: Study) -> pd.DataFrame:
    """The rows of all ablations with a stability plot, each run once."""
    import pandas as pd

    ablations = [ablation for ablation in study.ablations.values() if isinstance(load_plot(ablation.plot), Stability)]
    return pd.DataFrame([row for ablation in ablations for row in _rows(study, ablation)], columns=COLUMNS).drop_duplicates()


def stability_table(study: Study, ablation: Ablation) -> pd.DataFrame:
    """One row per run. A diverged run has no loss and no entropy, a mixer without softmax no logits.

    `loss_rise` is the loss of one step minus the lowest mean training loss of an earlier validation interval.
    `entropy_by_head` separates heads by spaces and layers by semicolons.
    """
    import pandas as pd

    return pd.DataFrame(_rows(study, ablation), columns=COLUMNS)


def _rows(study: Study, ablation: Ablation) -> Iterator[dict[str, Any]]:
    from pipeline.storage.results import read_history

    for task, variant in shown_cells(study, ablation):
        history = read_history(study, task, variant)
        training = study.training[task, variant]
        warmup_end = training.warmup * training.steps
        for run in runs.read_summary(task, variant)["runs"]:
            if run["seed"] in seeds_of(study, task, variant):
                of_run = history[(history["learning_rate"] == run["learning_rate"]) & (history["seed"] == run["seed"])]
                yield {"task": task, "variant": variant, **_measure(run, of_run, warmup_end)}


def _measure(run: dict[str, Any], history: pd.DataFrame, warmup_end: float) -> dict[str, Any]:
    lowest = history["train_loss"].cummin().shift()
    layers = [heads for heads in run["attention_entropy"] or () if heads is not None]
    entropies = [entropy for heads in layers for entropy in heads]
    return {
        "learning_rate": run["learning_rate"],
        "seed": run["seed"],
        "stop": run["stop"],
        "valid_loss": run["valid_loss"],
        "loss_rise": max((history["max_loss"] - lowest).max(), 0.0),
        "grad_norm": history.loc[history["step"] > warmup_end, "grad_norm"].max(),
        "max_logit": history["max_logit"].max(),
        "entropy": sum(entropies) / len(entropies) if entropies else math.nan,
        "entropy_by_head": "; ".join(" ".join(f"{entropy:.3f}" for entropy in heads) for heads in layers),
    }
