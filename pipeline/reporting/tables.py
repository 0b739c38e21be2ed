"""Tables of the report and README: scores by variant, length generalization by learning rate, verdicts."""

from __future__ import annotations

import json
from collections.abc import Mapping

import pandas as pd

from cat.config import ModelConfig
from cat.mixers.registry import AnyVariant
from pipeline.config.claims import SOLVED_AT
from pipeline.config.grid import seeds_of, shown_on, shown_tasks, shown_variants, variant_value, variants_on
from pipeline.config.study import Ablation, Study
from pipeline.reporting.labels import task_label, variant_label, with_slug
from pipeline.reporting.markdown import escape
from pipeline.reporting.verdicts import VALUES, left_out, of_the_study, read_verdicts, registration_table
from pipeline.storage import runs
from pipeline.storage.results import read_rates

LABELS = {"accuracy": "accuracy", "bits_per_byte": "bits per byte"}


def results_table(study: Study, results: pd.DataFrame, ablation: Ablation) -> str:
    """Markdown: one row per variant, one column per task and length with the mean over seeds and their range.

    If a mixer is a published layer, a column has the keys that depart from it.
    """
    columns = {}
    for task in shown_tasks(study, ablation):
        for multiple in study.evaluate.multiples:
            scores = results[(results["task"] == task) & (results["multiple"] == multiple)].groupby("variant")["value"]
            columns[f"{with_slug(task_label(study, task), task)} {multiple:g}x"] = scores.apply(_mean_and_range)
    frame = pd.DataFrame(columns).reindex(shown_variants(ablation)).fillna("-")
    frame.insert(0, "parameters", [_parameters(study, ablation, variant) for variant in frame.index])
    if any(is_published(study.variants[variant]) for variant in frame.index):
        frame.insert(1, "departs from the published layer", [departures(study.variants[variant]) for variant in frame.index])
    frame.index = pd.Index([with_slug(variant_label(study, variant), variant) for variant in frame.index], name="variant")
    return frame.to_markdown()


def is_published(model: AnyVariant) -> bool:
    """Whether a mixer of the model is a layer that a paper describes."""
    return isinstance(model, ModelConfig) and any(mixer.paper is not None for mixer in model.mixers)


def departures(model: AnyVariant) -> str:
    """The keys of a model's mixers that depart from the published layers, as in `expand: 1`; a dash if there are none.

    Several mixers are told apart by their names.
    """
    mixers = dict.fromkeys(model.mixers) if isinstance(model, ModelConfig) else {}
    parts = []
    for mixer in mixers:
        keys = ", ".join(f"{key}: {_as_in_yaml(value)}" for key, value in mixer.departures().items())
        parts += [f"{mixer.mixer}: {keys}" if keys and len(mixers) > 1 else keys]
    return "; ".join(filter(None, parts)) or "-"


def _as_in_yaml(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def references_table(study: Study, references: pd.DataFrame, ablation: Ablation) -> str:
    """Markdown: the scores of the partial strategies on the tasks of a figure, one column per length; empty if there are none."""
    columns = {multiple: f"{multiple:g}x" for multiple in study.evaluate.multiples}
    shown = references[references["task"].isin(shown_tasks(study, ablation)) & references["multiple"].isin(columns)]
    if not len(shown):
        return ""
    table = shown.pivot(index=["task", "reference"], columns="multiple", values="value")[[*columns]].rename(columns=columns)
    table = table.loc[shown[["task", "reference"]].drop_duplicates().itertuples(index=False, name=None)].reset_index()
    labels = [study.tasks[task].data.reference_labels[name] for task, name in zip(table["task"], table["reference"], strict=True)]
    table["reference"] = labels
    table = with_labels(study, table.rename(columns={"reference": "partial strategy, without a model"}))
    return table.to_markdown(index=False, floatfmt=".3f")


def as_markdown(table: pd.DataFrame, **options: str) -> str:
    """Markdown with three decimals, and a dash for missing values."""
    return table.astype(object).where(table.notna(), None).to_markdown(index=False, floatfmt=".3f", missingval="-", **options)


def folded(title: str, table: pd.DataFrame) -> str:
    """Markdown of a table that a click on `title` opens."""
    return f"<details><summary>{title}</summary>\n\n{as_markdown(table, intfmt=',')}\n\n</details>"


def with_labels(study: Study, table: pd.DataFrame) -> pd.DataFrame:
    """The table with `CAT-QK (qk)` for the slugs in its columns `task` and `variant`."""
    table = table.copy()
    for column, label in (("task", task_label), ("variant", variant_label)):
        if column in table:
            table[column] = [with_slug(label(study, slug), slug) for slug in table[column]]
    return table


def _parameters(study: Study, ablation: Ablation, variant: str) -> str:
    """Parameters on the first task of the figure; they differ between tasks because the embedding depends on the vocabulary."""
    task = next(task for task in shown_tasks(study, ablation) if variant in variants_on(study, task))
    return f"{runs.read_summary(task, variant)['parameters']:,}"


def rate_runs(study: Study, ablation: Ablation) -> pd.DataFrame:
    """One row per run at every learning rate: whether it solves 1x and the longest length, and what its key filter predicts.

    `carries_over` means that it solves both. `predicted` is whether the key filter meets the condition of
    cat/evaluation/diagnostics.py. A diverged run solves nothing.
    """
    rows = []
    for task in shown_tasks(study, ablation):
        data, rates = study.tasks[task].data, read_rates(task)
        at_length = rates.set_index(["variant", "learning_rate", "seed", "length"])["value"]
        for variant in shown_on(study, ablation, task):
            kernel_size = variant_value(study, variant, "conv_k")
            for run in runs.read_summary(task, variant)["runs"]:
                rate, seed = run["learning_rate"], run["seed"]
                if seed in seeds_of(study, task, variant):
                    solves = [bool(at_length[variant, rate, seed, n] >= SOLVED_AT) for n in (data.length, data.lengths[-1])]
                    predicted = bool(run["solves_every_length"]) and run["stop"] != "diverged"
                    rows.append((task, variant, kernel_size, rate, seed, solves[0], all(solves), predicted))
    columns = ["task", "variant", "kernel_size", "learning_rate", "seed", "solves_1x", "carries_over", "predicted"]
    return pd.DataFrame(rows, columns=columns)


def carry_over_table(study: Study, ablation: Ablation) -> pd.DataFrame:
    """Per task, variant and learning rate: runs, those that solve 1x, of these those that carry over, and their share."""
    counts = rate_runs(study, ablation).groupby(["task", "variant", "kernel_size", "learning_rate"], sort=False)
    table = counts[["solves_1x", "carries_over"]].sum().reset_index()
    table.insert(4, "runs", counts.size().to_numpy())
    table["share"] = table["carries_over"] / table["solves_1x"].where(table["solves_1x"] > 0)
    return table


def prediction_table(study: Study, ablation: Ablation) -> pd.DataFrame:
    """Per task: runs by whether the key filter predicts every length (rows) and whether the run carries over (columns)."""
    table = rate_runs(study, ablation)
    words = {True: "yes", False: "no"}
    cross = pd.crosstab([table["task"], table["predicted"].map(words)], table["carries_over"].map(words))
    full = pd.MultiIndex.from_product([list(dict.fromkeys(table["task"])), ["yes", "no"]], names=["task", "predicted"])
    cross = cross.reindex(index=full, columns=["yes", "no"], fill_value=0)
    return cross.rename(columns={"yes": "carries over", "no": "does not"}).reset_index()


def _mean_and_range(values: pd.Series) -> str:
    """`mean (lowest to highest) N diverged`; a diverged seed has no value."""
    ended = values.dropna()
    diverged = len(values) - len(ended)
    text = f"{ended.mean():.3f} ({ended.min():.3f} to {ended.max():.3f})" if len(ended) else ""
    return f"{text} {diverged} diverged".strip() if diverged else text


def headline() -> str:
    """Return README's summary as Markdown: the count of verdicts. The tables are in the report."""
    every = read_verdicts()
    if not len(of_the_study(every)):
        return left_out(every)
    return f"{_verdict_counts(every)} [Evidence for each claim](report.md#claims)."


def claims_section(questions: Mapping[str, str]) -> str:
    """Markdown: the table of contents with the verdicts about each question, and how claims are decided.

    `questions` maps the anchor of each section of the report to its heading.
    """
    every = read_verdicts()
    verdicts = of_the_study(every)
    rows = []
    for name, question in questions.items():
        counts = verdicts.loc[verdicts["ablation"] == name, "verdict"].value_counts()
        listed = ", ".join(f"{counts[verdict]} **{verdict}**" for verdict in VALUES if verdict in counts)
        rows.append({"topic": f"[{name.replace('_', ' ')}](#{name})", "question": escape(question), "claims": listed})
    contents = pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True)
    if not len(verdicts):
        return f"{contents}\n\n{left_out(every)}".strip()
    history = registration_table(verdicts).to_markdown(index=False, disable_numparse=True)
    return (
        f"{contents}\n\n{_verdict_counts(every)} {_EXPLANATION}\n\n"
        f"<details><summary>When each claim was registered and revised</summary>\n\n{history}\n\n</details>"
    )


_EXPLANATION = (
    "*Effect*: the mean of the metric minus that of the baseline, in the comparison named under *decided by*, or the number of"
    " seeds that solve the task. *p* belongs to the same test, for the whole claim: the largest p of its comparisons. For a"
    " contradicted claim it is the smallest p against the claim times the number of comparisons. Both are corrected for all"
    " claims. *Held in all n runs*: no seed and no sequence differs, so nothing is tested. docs/statistics.md explains the tests."
    " claims.yaml defines the claims; verdicts/comparisons.csv has every comparison."
)


def _verdict_counts(every: pd.DataFrame) -> str:
    verdicts = of_the_study(every)
    counts = verdicts["verdict"].value_counts()
    listed = ", ".join(f"{counts.get(verdict, 0)} {verdict}" for verdict in VALUES)
    others = left_out(every)
    return f"{len(verdicts)} claim{'s' if len(verdicts) > 1 else ''}: {listed}." + (f" {others}" if others else "")
