"""Mean scores of variants by tasks."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from pipeline.config.grid import shown_variants
from pipeline.config.plots import Plot
from pipeline.config.study import Ablation, Study
from pipeline.reporting.labels import variant_label, with_slug

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


class Heatmap(Plot):
    """One panel per metric and length, one row per variant, one column per task. Bright is better for both metrics.

    References are further rows. They do not change the colours of the variants.
    """

    caption = (
        "Mean score over seeds of each variant (row) on each task (column); brighter is better. Look for rows that stay bright in"
        " the panel on the right: these variants carry over to longer tests. Rows with grey names are partial strategies."
    )
    shows_references = True

    def draw(self, study: Study, ablation: Ablation, results: pd.DataFrame, references: pd.DataFrame) -> Figure:
        import matplotlib.pyplot as plt
        import pandas as pd
        import seaborn as sns

        from pipeline.figures.drawing.axes import task_title
        from pipeline.figures.drawing.references import reference_words
        from pipeline.figures.drawing.scores import mean_scores
        from pipeline.reporting.tables import LABELS

        words = reference_words(study, ablation)
        groups = list(mean_scores(study, ablation, results))
        labels = [with_slug(variant_label(study, variant), variant) for variant in shown_variants(ablation)] + [*words.values()]
        widths = [max(means.shape[1], 1.6) for *_, means in groups]
        size = (1.1 * sum(widths) + 0.1 * max(map(len, labels)), 0.5 * len(labels) + 3.2)
        figure, panels = plt.subplots(1, len(groups), figsize=size, width_ratios=widths, squeeze=False, layout="constrained")
        bits = [means for metric, _, means in groups if metric == "bits_per_byte"]
        for axes, (metric, multiple, means) in zip(panels[0], groups, strict=True):
            low, high = (
                (0, 1) if metric == "accuracy" else (min(b.min(axis=None) for b in bits), max(b.max(axis=None) for b in bits))
            )
            colours = "cividis" if metric == "accuracy" else "cividis_r"
            if words:
                at_length = references[references["multiple"] == multiple].astype({"value": float})
                levels = at_length.pivot_table(index="reference", columns="task", values="value")
                means = pd.concat([means, levels.reindex(index=list(words), columns=means.columns)])
            axes.grid(visible=False)
            sns.heatmap(means, vmin=low, vmax=high, cmap=colours, annot=True, fmt=".2f", cbar=False, linewidths=1, ax=axes)
            axes.set(xlabel="", ylabel="", title=f"{LABELS[metric]}\nat {multiple:g}x the\ntraining length")
            columns = [textwrap.fill(task_title(study, task), 28) for task in means.columns]
            axes.set_xticks(
                [index + 0.5 for index in range(len(columns))], columns, rotation=35, ha="right", rotation_mode="anchor"
            )
            axes.set_yticks([index + 0.5 for index in range(len(labels))], labels if axes is panels[0][0] else [], rotation=0)
            for label in axes.get_yticklabels()[len(shown_variants(ablation)) :]:
                label.set_color("0.4")
        return figure
