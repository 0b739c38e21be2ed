"""Attention on one test sequence."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from cat.tasks.needles import Needles
from cat.tasks.recall import Recall
from pipeline.config.grid import seeds_of, shown_cells, shown_tasks, shown_variants
from pipeline.config.plots import Plot
from pipeline.config.study import Ablation, Study
from pipeline.reporting.labels import variant_label

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from cat.tasks.tokenizer import Tokenizer
    from pipeline.figures.drawing.example_sequence import Example as Sequence


class Example(Plot):
    """Attention of every query of one test sequence, one panel per variant; a frame marks the token of the answer.

    Shows the first seed that did not diverge, and its layer and head with the most attention on the answers.
    """

    caption = (
        "Attention of every query of one test sequence. A frame marks the token of the answer: a model that recalls has its dark"
        " cells inside the frames."
    )
    shows_models = True
    extra_plots: ClassVar = {}
    rows = "the first test sequence of the training length, with the weights in runs/"

    def check(self, study: Study, ablation: Ablation) -> Iterator[str]:
        for variant in shown_variants(ablation):
            if not study.variants[variant].has_attention:
                yield f"plot = {self.name} needs attention weights, but variant {variant!r} has none"
        for task in shown_tasks(study, ablation):
            if not isinstance(study.tasks[task].data, Recall | Needles):
                yield f"plot = {self.name} needs a task of kind recall or needles, but task {task!r} is not"

    def sources(self, study: Study, ablation: Ablation) -> list[str]:
        return []

    def draw(self, study: Study, ablation: Ablation, results: pd.DataFrame, references: pd.DataFrame) -> Figure:
        import matplotlib.pyplot as plt
        import numpy as np
        import seaborn as sns
        from matplotlib.patches import Rectangle

        from pipeline.figures.drawing.axes import task_title
        from pipeline.figures.drawing.example_sequence import query_attention, read_example

        cells = shown_cells(study, ablation)
        figure, panels = plt.subplots(len(cells), 1, figsize=(11, 2.3 * len(cells)), squeeze=False, layout="constrained")
        below = [task for task, _ in cells[1:]] + [""]
        for (task, variant), task_below, axes in zip(cells, below, panels[:, 0], strict=True):
            data = read_example(task)
            weights = query_attention(task, variant, seeds_of(study, task, variant), data)
            title = f"{variant_label(study, variant)} on {task_title(study, task)}"
            if weights is None:
                title += ": every seed diverged"
            else:
                queries = np.arange(len(weights))
                sns.heatmap(weights, vmin=0, vmax=1, cmap="Blues", ax=axes, cbar_kws={"label": "attention"})
                for query, position in zip(queries, data.answer_positions, strict=True):
                    axes.add_patch(Rectangle((float(position), float(query)), 1, 1, fill=False, edgecolor="C3", lw=1.4))
                title += f": {weights[queries, data.answer_positions].mean():.2f} of the attention on the answers"
            labels = _labels(study, task, data)
            axes.set_xticks([position + 0.5 for position in labels.positions], labels.tokens, rotation=90, fontsize=7)
            axes.set_yticks(np.arange(len(labels.queries)) + 0.5, labels.queries, rotation=0, fontsize=7)
            axes.set(title=title, ylabel="query")
            if task != task_below:
                axes.set_xlabel("input token" + labels.legend)
        return figure


class Labels(NamedTuple):
    """The labels of the axes."""

    positions: Iterable[int]
    """The tokens that have a label."""
    tokens: list[str]
    queries: list[str]
    legend: str


def _labels(study: Study, task: str, sequence: Sequence) -> Labels:
    data = study.tasks[task].data
    if isinstance(data, Needles):
        return _needle_labels(task, data, sequence)
    names = _token_names(study, task, sequence.tokens)
    queries = [names[position] for position in sequence.query_positions]
    return Labels(range(len(names)), names, queries, " (k: key, v: value, dot: filler)")


def _needle_labels(task: str, data: Needles, sequence: Sequence) -> Labels:
    """Label the asked values with their whole needle: the other tokens are too many."""
    from pipeline.storage.tokenizers import read_tokenizer

    tokenizer, n = read_tokenizer(task), data.ngram
    needles = [_spell(tokenizer, sequence.tokens[end - n : end + 1]) for end in sequence.answer_positions]
    queries = [_spell(tokenizer, sequence.tokens[end - n + 1 : end + 1]) for end in sequence.query_positions]
    positions = [int(position) for position in sequence.answer_positions]
    tokens = [f"{' '.join(key)} \N{RIGHTWARDS ARROW} {value}" for *key, value in needles]
    return Labels(
        positions, tokens, [" ".join(query) for query in queries], " (key \N{RIGHTWARDS ARROW} value of the asked needles)"
    )


def _spell(tokenizer: Tokenizer, tokens: Iterable[int]) -> list[str]:
    """The tokens as text, with visible spaces and line breaks."""
    visible = str.maketrans({" ": "\N{OPEN BOX}", "\n": "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}", "$": r"\$"})
    spelled = [tokenizer.spell(int(token), None).decode("utf-8", "replace") for token in tokens]
    return [text.translate(visible) for text in spelled]


def _token_names(study: Study, task: str, tokens: Iterable[int]) -> list[str]:
    data = study.tasks[task].data
    assert isinstance(data, Recall)

    def name(token: int) -> str:
        if token == 0:
            return "start"
        if token <= data.keys:
            return f"k{token}"
        return f"v{token - data.keys}" if token <= data.keys + data.values else "."

    return [name(token) for token in tokens]
