"""reports/: three figures an ablation, tables, metrics, the report as Markdown and HTML: group-bys over the one results table."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from cat.configuration import Theory
from pipeline import runs
from pipeline.files import REPORTS, whole, write_json
from pipeline.grid import variants_on
from pipeline.html import page
from pipeline.params import Ablation, Study, shown_tasks, shown_variants
from pipeline.results import PRIMARY, primary, read_history, read_results, strays
from pipeline.verdicts import read_verdicts, verdict_table

LABELS = {"accuracy": "accuracy", "bits_per_byte": "bits per byte"}
README_MARKS = ("<!-- results: written by `python -m pipeline readme` -->", "<!-- end of results -->")


def render(study: Study) -> None:
    """Writes reports/ anew. Raises ValueError where a cell of the grid has no results."""
    results = read_results(study)
    scores = primary(study, results)
    # Without a salt and with a date, an SVG would differ from run to run.
    matplotlib.rcParams.update({"svg.hashsalt": "cat", "svg.fonttype": "none", "figure.dpi": study.render.dpi})
    sns.set_theme(style="whitegrid", context="notebook", rc={"axes.titlesize": "medium"})
    with whole(REPORTS) as folder:
        for name in ("figures", "svg", "metrics"):
            (folder / name).mkdir(parents=True)
        sections = []
        for name, ablation in study.ablations.items():
            if shown_tasks(study, ablation) and shown_variants(ablation):
                sections.append(_section(folder, study, results, name, ablation))
        headline = next((a for a in study.ablations.values() if a.tasks and a.variants), None)
        if headline is not None:
            parts = [_verdicts(), table(study, scores, headline), _what_was_run(study)]
            (folder / "headline.md").write_text("\n\n".join(filter(None, parts)) + "\n")
        parts = ["# What the study shows", _verdicts(), _what_was_run(study), *sections]
        report = "\n\n".join(filter(None, parts)) + "\n"
        (folder / "report.md").write_text(report, encoding="utf-8")
        (folder / "report.html").write_text(page(report, folder / "svg"), encoding="utf-8")
        _curves(study, scores).to_csv(folder / "lengths.csv", index=False, lineterminator="\n")
        for variant, values in _metrics(study, scores).items():
            write_json(folder / "metrics" / f"{variant}.json", values)
    for stray in strays(study):
        print(f"{stray}: is no cell of the study any more and was left out; `rm -r {stray}` removes it")


def _section(folder: Path, study: Study, results: pd.DataFrame, name: str, ablation: Ablation) -> str:
    """Draws the figures of one ablation; returns its part of the report."""
    shown = results[results["task"].isin(shown_tasks(study, ablation)) & results["variant"].isin(shown_variants(ablation))]
    scores = primary(study, shown)
    draw: dict[str, Callable[[Study, Ablation, pd.DataFrame], Figure]] = {
        "heatmap": heatmap,
        "sweep": sweep,
        "contrast": contrast,
        "lines": lengths,
        "attention": attention,
        "rates": rates,
    }
    figures = {name: draw[ablation.figure], f"{name}_length": lengths, f"{name}_training": training}
    if ablation.figure == "lines":
        del figures[f"{name}_length"]
    lines = [f"## {ablation.question}", table(study, scores, ablation)]
    if ablation.figure == "rates":
        lines.append(found(study, ablation).to_markdown(index=False))
    for file, function in figures.items():
        figure = function(study, ablation, shown if function is attention else scores)
        figure.savefig(folder / "figures" / f"{file}.png", bbox_inches="tight", metadata={"Software": None})
        figure.savefig(folder / "svg" / f"{file}.svg", bbox_inches="tight", metadata={"Date": None})
        plt.close(figure)
        lines.append(f"![{file.replace('_', ' ')}](figures/{file}.png)")
    return "\n\n".join(lines)


def _verdicts() -> str:
    """The claims of claims.yaml with their verdicts, as Markdown; empty where there are none."""
    verdicts = read_verdicts()
    if not len(verdicts):
        return ""
    counts = verdicts["verdict"].value_counts()
    said = ", ".join(f"{counts.get(verdict, 0)} {verdict}" for verdict in ("supported", "contradicted", "undecided"))
    table = verdict_table(verdicts).to_markdown(index=False, disable_numparse=True)
    return (
        f"{table}\n\n{len(verdicts)} claims: {said}. An effect is the mean of the metric less that of the other side, in the"
        " comparison that decides; its interval is a bootstrap over seeds and test sequences, p that of Student's test over"
        " seeds, corrected for all claims; a dash where no seed differs from another. claims.yaml says what decides a claim,"
        " verdicts/comparisons.csv has every comparison."
    )


def lengths(study: Study, ablation: Ablation, results: pd.DataFrame) -> Figure:
    """The metric against the evaluation length by variant, a panel a task."""
    figure, panels = _panels(shown_tasks(study, ablation))
    for task, axes in panels.items():
        here = results[results["task"] == task]
        _lines(study, ablation, here, axes, x="multiple", y="value")
        axes.set_xscale("log", base=2)
        _ticks(axes, study.tasks[task].data.multiples, "{:g}x")
        axes.axvline(1, color="0.6", lw=1, ls=":", zorder=0)
        _label(study, task, axes, f"length, in training lengths of {study.tasks[task].data.length}")
    _legend(figure, panels)
    return figure


def training(study: Study, ablation: Ablation, results: pd.DataFrame) -> Figure:
    """The validation metric against the training step by variant, a panel a task."""
    figure, panels = _panels(shown_tasks(study, ablation))
    for task, axes in panels.items():
        column = "valid_accuracy" if study.tasks[task].data.goal == "accuracy" else "valid_loss"
        tables = []
        for variant in [v for v in shown_variants(ablation) if v in variants_on(study, task)]:
            rate = runs.read_summary(task, variant)["learning_rate"]
            tables.append(read_history(study, task, variant, rate).assign(variant=variant))
        history = pd.concat(tables, ignore_index=True)
        # Seeds that stopped early keep their last value, or the mean over seeds would jump as they leave.
        history = history.pivot(index="step", columns=["variant", "seed"], values=column).ffill()
        history = history.melt(ignore_index=False, value_name="value").reset_index()
        _lines(study, ablation, history, axes, x="step", y="value", markers=False)
        _label(study, task, axes, "training step")
        axes.set_ylabel("validation accuracy" if column == "valid_accuracy" else "validation loss, nats a byte")
    _legend(figure, panels)
    return figure


def heatmap(study: Study, ablation: Ablation, results: pd.DataFrame) -> Figure:
    """Variants by tasks, a panel a length; tasks that are scored in bits have panels of their own, dark for good as well."""
    groups: list[tuple[float, str, pd.DataFrame]] = []
    for goal, metric in PRIMARY.items():
        tasks = [task for task in shown_tasks(study, ablation) if study.tasks[task].data.goal == goal]
        for multiple in study.evaluate.multiples:
            here = results[results["task"].isin(tasks) & (results["multiple"] == multiple)]
            if len(here):
                values = here.pivot_table(index="variant", columns="task", values="value", aggfunc="mean")
                groups.append((multiple, metric, values.reindex(index=shown_variants(ablation), columns=tasks)))
    widths = [group[2].shape[1] + 0.8 for group in groups]
    figure, panels = plt.subplots(
        1, len(groups), figsize=(1.1 * sum(widths), 0.5 * len(shown_variants(ablation)) + 1.4), width_ratios=widths, squeeze=False
    )
    for axes, (multiple, metric, values) in zip(panels[0], groups, strict=True):
        bits = [g[2] for g in groups if g[1] == "bits_per_byte"]
        low, high = (0, 1) if metric == "accuracy" else (min(b.min(axis=None) for b in bits), max(b.max(axis=None) for b in bits))
        colours = "cividis" if metric == "accuracy" else "cividis_r"
        sns.heatmap(values, vmin=low, vmax=high, cmap=colours, annot=True, fmt=".2f", cbar=False, linewidths=1, ax=axes)
        axes.set(xlabel="", ylabel="", title=f"{LABELS[metric]}\nat {multiple:g}x the\ntraining length")
        axes.tick_params(axis="y", rotation=0)
        if axes is not panels[0][0]:
            axes.set_yticklabels([])
    figure.tight_layout()
    return figure


def sweep(study: Study, ablation: Ablation, results: pd.DataFrame) -> Figure:
    """The metric against a number of the variants, a panel a task, a line a length; `full` stands at the training length."""
    figure, panels = _panels(shown_tasks(study, ablation))
    assert ablation.x is not None
    for task, axes in panels.items():
        length = study.tasks[task].data.length
        numbers = {v: getattr(study.variants[v], ablation.x) for v in trained_variants(study, ablation)}
        here = results[(results["task"] == task) & results["multiple"].isin(study.evaluate.multiples)].copy()
        _limit(study, here, axes)
        here = here[here["variant"].isin(numbers)]
        here[ablation.x] = here["variant"].map({v: length if n == "full" else n for v, n in numbers.items()}).astype(float)
        here["at length"] = here["multiple"].map(lambda multiple: f"{multiple:g}x")
        sns.lineplot(
            here, x=ablation.x, y="value", hue="at length", style="at length", markers=True, dashes=False, ax=axes,
            palette=sns.color_palette("colorblind", here["at length"].nunique()), errorbar=_errorbar(study),
        )  # fmt: skip
        axes.set_xscale("log", base=2)
        _ticks(axes, sorted(set(here[ablation.x])), "{:g}")
        _label(
            study,
            task,
            axes,
            f"{ablation.x}: taps, the last as many as the sequence has" if "full" in numbers.values() else ablation.x,
        )
    _legend(figure, panels)
    return figure


def contrast(study: Study, ablation: Ablation, results: pd.DataFrame) -> Figure:
    """The metric by a setting of the variants, filtered beside unfiltered; a row a task, a column a length."""
    multiples, tasks = study.evaluate.multiples, shown_tasks(study, ablation)
    figure, grid = plt.subplots(
        len(tasks), len(multiples), squeeze=False, figsize=(5.2 * len(multiples), 3.4 * len(tasks)), sharex=True
    )
    assert ablation.x is not None
    settings = {v: str(getattr(study.variants[v], ablation.x)) for v in study.variants if v in trained_variants(study, ablation)}
    for task, row in zip(tasks, grid, strict=True):
        for multiple, axes in zip(multiples, row, strict=True):
            here = results[(results["task"] == task) & (results["multiple"] == multiple)].copy()
            _limit(study, here, axes)
            here = here[here["variant"].isin(settings)]
            here[ablation.x] = here["variant"].map(settings)
            here["filters"] = here["variant"].map(
                {v: "with filters" if study.variants[v].filtered else "without" for v in settings}
            )
            sns.pointplot(
                here, x=ablation.x, y="value", order=list(dict.fromkeys(settings.values())), ax=axes, linestyle="none",
                hue="filters", hue_order=["without", "with filters"], palette=sns.color_palette("colorblind", 2),
                markers=["o", "s"], dodge=0.3, errorbar=_errorbar(study),
            )  # fmt: skip
            _label(study, task, axes, ablation.x)
            axes.set_title(f"{task}, at {multiple:g}x the training length")
    panels = {str(i): axes for i, axes in enumerate(grid.flat)}
    figure.tight_layout()
    _legend(figure, panels)
    return figure


def attention(study: Study, ablation: Ablation, results: pd.DataFrame) -> Figure:
    """How much of the attention is on the answer's token, and how many tokens share it; of the layer with the most on it."""
    tasks = shown_tasks(study, ablation)
    figure, grid = plt.subplots(2, len(tasks), squeeze=False, figsize=(4.4 * len(tasks), 6.4), sharex="col")
    for task, column in zip(tasks, grid.T, strict=True):
        here = results[(results["task"] == task) & results["metric"].str.startswith("attention_")].copy()
        here[["metric", "layer"]] = here["metric"].str.rsplit("_", n=1, expand=True)
        by_layer = here.pivot_table(index=["variant", "layer"], columns="metric", values="value", aggfunc="mean")
        by_layer = by_layer.reindex(columns=["attention_on_answer", "attention_entropy"])
        best = by_layer["attention_on_answer"].fillna(0).groupby("variant").idxmax()
        here = here.set_index(["variant", "layer"]).loc[list(best)].reset_index()
        for metric, axes in zip(("attention_on_answer", "attention_entropy"), column, strict=True):
            shown = here[here["metric"] == metric]
            variants = [v for v in shown_variants(ablation) if v in variants_on(study, task)]
            sns.stripplot(shown, x="variant", y="value", order=variants, ax=axes, color="C0", jitter=False, size=7, alpha=0.6)
            axes.tick_params(axis="x", rotation=45)
            axes.set(xlabel="", title=task)
        column[0].set(ylabel="attention on the answer's token", ylim=(-0.04, 1.04))
        if not by_layer["attention_on_answer"].notna().any():  # answers of text stand nowhere
            column[0].set_axis_off()
        column[1].set(ylabel="entropy of attention, nats", ylim=(-0.1, None))
    figure.tight_layout()
    return figure


def rates(study: Study, ablation: Ablation, results: pd.DataFrame) -> Figure:
    """By learning rate, the share of seeds whose key filter solves every length, and the mean accuracy on validation, dotted."""
    table = found(study, ablation)
    figure, panels = _panels(shown_tasks(study, ablation))
    for task, axes in panels.items():
        for variant, here in table[table["task"] == task].groupby("variant", sort=False):
            looks = style(study, str(variant))
            axes.plot(here["learning rate"], here["found"] / here["runs"], label=variant, lw=1.8, **looks)
            axes.plot(here["learning rate"], here["validation accuracy"], color=looks["color"], ls=":", lw=1.2)
        axes.set_xscale("log")
        _ticks(axes, study.tasks[task].train.learning_rates, "{:g}")
        axes.set(
            title=task,
            xlabel="learning rate",
            ylabel="share of seeds that found it,\ndotted: validation accuracy",
            ylim=(-0.04, 1.04),
        )
    _legend(figure, panels)
    return figure


def table(study: Study, results: pd.DataFrame, ablation: Ablation) -> str:
    """Markdown: a row a variant with its parameters, a column a task and length with the mean over seeds and their range."""
    columns = {}
    for task in shown_tasks(study, ablation):
        for multiple in study.evaluate.multiples:
            here = results[(results["task"] == task) & (results["multiple"] == multiple)].groupby("variant")["value"]
            columns[f"{task} {multiple:g}x"] = here.apply(_mean_and_spread)
    frame = pd.DataFrame(columns).reindex(shown_variants(ablation)).fillna("-")
    frame.insert(0, "parameters", [_parameters(study, ablation, variant) for variant in frame.index])
    return frame.rename_axis("variant").to_markdown()


def _parameters(study: Study, ablation: Ablation, variant: str) -> str:
    """On the first task of the figure that it is trained on; vocabularies differ from task to task, and embeddings with them."""
    task = next(task for task in shown_tasks(study, ablation) if variant in variants_on(study, task))
    return f"{runs.read_summary(task, variant)['parameters']:,}"


def found(study: Study, ablation: Ablation) -> pd.DataFrame:
    """By task, variant and learning rate: the runs, those whose key filter solves every length, and the accuracy on validation.

    Only variants whose filter the condition is about (cat/diagnostics.py); a run that diverged has found nothing.
    """
    rows = []
    for task in shown_tasks(study, ablation):
        for variant in [v for v in shown_variants(ablation) if v in variants_on(study, task)]:
            tried = pd.DataFrame(runs.read_summary(task, variant)["runs"])
            tried = tried[tried["seed"].isin(study.seeds)]
            if tried["solves_every_length"].notna().any():
                for rate, group in tried.groupby("learning_rate"):
                    rows.append(
                        {
                            "task": task,
                            "variant": variant,
                            "learning rate": rate,
                            "runs": len(group),
                            "found": int((group["solves_every_length"].eq(True) & group["stop"].ne("diverged")).sum()),
                            "validation accuracy": group["valid_accuracy"].mean(),
                        }
                    )
    return pd.DataFrame(rows, columns=["task", "variant", "learning rate", "runs", "found", "validation accuracy"])


def _mean_and_spread(values: pd.Series) -> str:
    """`mean (lowest to highest)`; a seed that diverged has no value and is counted."""
    left = values.dropna()
    lost = len(values) - len(left)
    text = f"{left.mean():.3f} ({left.min():.3f} to {left.max():.3f})" if len(left) else ""
    return f"{text} {lost} diverged".strip() if lost else text


def _what_was_run(study: Study) -> str:
    devices = {runs.read_summary(task, variant)["device"] for task in study.tasks for variant in variants_on(study, task)}
    rates = {name: ", ".join(f"{rate:g}" for rate in section.train.learning_rates) for name, section in study.tasks.items()}
    multiples = " and ".join(f"{multiple:g}x" for multiple in study.evaluate.multiples)
    return (
        f"Mean over seeds {', '.join(map(str, study.seeds))} (lowest to highest) at {multiples} the training length; "
        + "; ".join(f"{name}: {LABELS[PRIMARY[section.data.goal]]}" for name, section in study.tasks.items())
        + f". Run on {', '.join(sorted(devices))} in {study.precision}; learning rates tried: "
        + "; ".join(f"{name} {rate}" for name, rate in rates.items())
        + ". A dash: not trained on that task, or positions that do not reach that length."
    )


def _curves(study: Study, results: pd.DataFrame) -> pd.DataFrame:
    """Mean and spread by task, variant and length, for `dvc plots`."""
    keys = ["task", "variant", "length", "multiple", "metric"]
    grouped = results.groupby(keys, sort=False)["value"]
    return grouped.agg(mean="mean", low="min", high="max", seeds="count").reset_index()


def _metrics(study: Study, results: pd.DataFrame) -> dict[str, dict[str, dict[str, float]]]:
    """Variant -> task -> metric at a length -> mean over seeds, for `dvc metrics`: a row a variant, a column a task."""
    shown = results[results["multiple"].isin(study.evaluate.multiples)]
    means = shown.groupby(["variant", "task", "metric", "multiple"])["value"].mean().dropna()
    nested: dict[str, dict[str, dict[str, float]]] = {variant: {} for variant in study.variants}
    for (variant, task, metric, multiple), value in means.items():
        nested[variant].setdefault(task, {})[f"{metric}_{multiple:g}x"] = round(value, 6)
    return nested


def style(study: Study, variant: str) -> dict[str, Any]:
    """Colour, dash and marker of a variant: the same in every figure, and kept when variants are added at the end."""
    if isinstance(study.variants[variant], Theory):
        return {"color": "black", "linestyle": ":", "marker": "x"}
    number = list(study.variants).index(variant)
    colours, dashes, markers = sns.color_palette("colorblind", 10), ["-", "--", ":"], "osD^vP*Xph<>"
    return {
        "color": colours[number % len(colours)],
        "linestyle": dashes[number % len(dashes)],  # lines that coincide show through each other
        "marker": markers[number % len(markers)],
    }


def _lines(study: Study, ablation: Ablation, table: pd.DataFrame, axes: Axes, *, x: str, y: str, markers: bool = True) -> None:
    for variant in shown_variants(ablation):
        here = table[table["variant"] == variant]
        if here[y].notna().any():
            looks = style(study, variant)
            if not markers:
                looks["marker"] = None
            sns.lineplot(here, x=x, y=y, ax=axes, label=variant, errorbar=_errorbar(study), legend=False, lw=1.8, ms=6, **looks)


def trained_variants(study: Study, ablation: Ablation) -> list[str]:
    """The variants of the figure without those of a theorem, which have no place on an axis."""
    return [v for v in shown_variants(ablation) if not isinstance(study.variants[v], Theory)]


def _limit(study: Study, table: pd.DataFrame, axes: Axes) -> None:
    """What a theorem's weights reach, as a line across."""
    values = table[table["variant"].map(lambda variant: isinstance(study.variants[variant], Theory))]["value"]
    if len(values):
        axes.axhline(values.mean(), color="black", lw=1.4, ls=":", label="theory")


def _panels(tasks: Iterable[str]) -> tuple[Figure, dict[str, Axes]]:
    tasks = list(tasks)
    figure, grid = plt.subplots(1, len(tasks), figsize=(4.4 * len(tasks), 3.8), squeeze=False)
    figure.tight_layout(w_pad=2.5)
    return figure, dict(zip(tasks, grid[0], strict=True))


def _label(study: Study, task: str, axes: Axes, x: str) -> None:
    metric = PRIMARY[study.tasks[task].data.goal]
    axes.set(title=task, xlabel=x, ylabel=LABELS[metric])
    if metric == "accuracy":
        axes.set_ylim(-0.04, 1.04)
    if legend := axes.get_legend():
        legend.remove()


def _ticks(axes: Axes, values: Iterable[float], form: str) -> None:
    values = list(values)
    axes.xaxis.set_major_locator(FixedLocator(values))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([form.format(value) for value in values])


def _legend(figure: Figure, panels: dict[str, Axes]) -> None:
    """One legend for all panels, beside them."""
    found: dict[str, Any] = {}
    for axes in panels.values():
        found |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True) if label not in found}
    figure.legend(found.values(), found.keys(), loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)


def _errorbar(study: Study) -> tuple[str, int]:
    return ("pi", 100) if study.render.spread == "range" else ("sd", 1)


def update_readme() -> None:
    """Replaces what stands between the marks in README.md by reports/headline.md. Raises ValueError where a mark is missing."""
    path = Path("README.md")
    text = path.read_text(encoding="utf-8")
    first, last = README_MARKS
    if first not in text or last not in text:
        raise ValueError(f"README.md: lacks the line {first if first not in text else last}")
    before, after = text.split(first)[0], text.split(last)[1]
    headline = (REPORTS / "headline.md").read_text(encoding="utf-8")
    with whole(path) as part:
        part.write_text(f"{before}{first}\n\n{headline}\n{last}{after}", encoding="utf-8")
