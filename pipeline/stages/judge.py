"""Write verdicts/: each claim of claims.yaml is supported, contradicted or undecided by the results, with a reason.

docs/statistics.md says how, and pipeline/reporting/statistics.py has the tests. In short:

    means     the variant's mean metric over seeds minus that of the baseline: Student's t over seeds and test sequences, or a
              hierarchical bootstrap for losses, whose sequences are far from normal
    counts    seeds that solve the task: binomial and Fisher's exact tests. A diverged seed has not solved it. A construction is
              one model, so its sequences with every answer correct are counted instead

A claim is supported if all its comparisons are, contradicted if one of them is. Its p value for the claim is the largest of its
comparisons. Its p value against the claim is the smallest times the number of comparisons. The p values for all claims are
corrected together (Benjamini and Hochberg), and separately those against them. Nothing is tested if no seed and no sequence
differs: the number decides the verdict, which says in how many runs it held.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from cat.mixers.registry import ConstructionConfig
from pipeline.config.claims import COUNT_TESTS, LEVEL, SHARE_TESTS, SOLVED_AT, Claim, Revision
from pipeline.config.grid import judged_seeds
from pipeline.config.study import Study
from pipeline.reporting.diagnosis import AS_GOOD
from pipeline.reporting.statistics import (
    RESAMPLES,
    Count,
    Effect,
    Floats,
    Sample,
    bootstrap,
    difference,
    sequence_counts,
    share,
    share_difference,
    share_interval,
)
from pipeline.reporting.verdicts import ABSENT
from pipeline.storage.files import atomic_write
from pipeline.storage.paths import SCORES, VERDICTS
from pipeline.storage.results import read_references, read_results
from pipeline.storage.scores import read_scores
from pipeline.storage.tables import CLAIM_COLUMNS, COMPARISON_COLUMNS, PRIMARY, REFERENCE_COLUMNS

SKEWED = ("bits_per_byte", "loss")
"""Metrics whose intervals come from the bootstrap."""
Verdict = Literal["supported", "contradicted", "undecided"]
SequenceSums = Mapping[str, Mapping[str, Mapping[tuple[str, int, int], Floats]]]
"""{task: {metric: {(variant, seed, length): two rows}}} as from `read_scores`."""


class Side(NamedTuple):
    """A variant at a length."""

    variant: str
    multiple: float


_NOT_COUNTED = Count(math.nan, math.nan)


class Comparison(NamedTuple):
    """One variant against one baseline, with the result."""

    claim: str
    task: str
    metric: str
    length: int
    variant: str
    baseline: str
    effect: float = math.nan
    low: float = math.nan
    high: float = math.nan
    k: float = math.nan
    """Seeds of the variant that solve the task, of `n`; nan if the metric does not say."""
    n: float = math.nan
    baseline_k: float = math.nan
    baseline_n: float = math.nan
    p_for: float = math.nan
    """Probability of an effect at least this large if the claim is false; nan if no seed and no sequence differs."""
    p_against: float = math.nan
    seeds: int = 0
    """The smaller number of the two sides."""
    verdict: Verdict = "undecided"
    reason: str = ""


class Evidence:
    """The results of the seeds that decide claims: metrics by seed, and the scores per sequence behind some of them."""

    def __init__(self, study: Study, results: pd.DataFrame, sequences: SequenceSums, references: pd.DataFrame | None = None):
        self.study, self.sequences = study, sequences
        self.references = pd.DataFrame(columns=[*REFERENCE_COLUMNS]) if references is None else references
        keys = ["task", "metric", "variant", "length"]
        by_seed = results[results["seed"] >= study.verdict_seeds_from].sort_values("seed").groupby(keys, sort=False)["value"]
        self.values: dict[Any, Floats] = {key: values.to_numpy(float) for key, values in by_seed}

    @classmethod
    def read(cls, study: Study) -> Evidence:
        """Read the files. Raises ValueError if a cell of the study has no results."""
        sequences = {task: read_scores(SCORES / f"{task}.npz") for task in study.tasks}
        return cls(study, read_results(study), sequences, read_references(study))

    def sample(self, task: str, metric: str, variant: str, length: int) -> Sample:
        """Draw RESAMPLES samples of the sequences, the same ones for all seeds and variants of a length."""
        values, sequences = self.values[task, metric, variant, length], 0
        draws = np.tile(values, (RESAMPLES, 1))
        of_metric = self.sequences.get(task, {}).get(metric, {})
        for index, seed in enumerate(sorted(judged_seeds(self.study, task, variant))):
            if (sums := of_metric.get((variant, seed, length))) is not None:
                sequences = sums.shape[1]
                counts = sequence_counts(sequences, length)
                draws[:, index] = (counts @ sums[0]) / (counts @ sums[1])
        return Sample(values, draws, sequences)

    def shortcut(self, task: str, length: int, accuracy: float) -> str | None:
        """The weakest partial strategy that is as good as this accuracy, with its score."""
        known = self.references[(self.references["task"] == task) & (self.references["length"] == length)]
        known = known[known["value"] > accuracy - AS_GOOD].sort_values("value", kind="stable")
        if not len(known):
            return None
        return f"{self.study.tasks[task].data.reference_labels[known['reference'].iloc[0]]} ({known['value'].iloc[0]:.3f})"

    def count(self, task: str, metric: str, variant: str, length: int, solved_at: float) -> Count:
        """Count the seeds that reach `solved_at`; for a construction the test sequences with every answer correct."""
        if isinstance(self.study.variants.get(variant), ConstructionConfig):
            runs = self.sequences.get(task, {}).get("accuracy", {})
            sums = next((rows for (name, _, at), rows in runs.items() if (name, at) == (variant, length)), None)
            if sums is not None:
                return Count(int((sums[0] == sums[1]).sum()), sums.shape[1])
        values = self.values[task, metric, variant, length]
        return Count(int((values >= solved_at).sum()), len(values))


def judge(study: Study, claims: dict[str, Claim]) -> None:
    """Write verdicts/comparisons.csv and verdicts/claims.csv."""
    evidence = Evidence.read(study)
    comparisons = {name: list(compare(evidence, name, claim)) for name, claim in claims.items()}
    verdicts = decide(claims, comparisons)
    with atomic_write(VERDICTS) as folder:
        folder.mkdir()
        rows = itertools.chain.from_iterable(comparisons.values())
        for name, table in (("comparisons", pd.DataFrame(rows, columns=[*COMPARISON_COLUMNS])), ("claims", verdicts)):
            table.to_csv(folder / f"{name}.csv", index=False, lineterminator="\n", float_format="%.6g")


def compare(evidence: Evidence, name: str, claim: Claim) -> Iterator[Comparison]:
    """All comparisons of the claim."""
    tasks = evidence.study.tasks
    baselines: tuple[str | float | None, ...] = claim.baseline if isinstance(claim.baseline, tuple) else (claim.baseline,)
    for task, multiple, variant, baseline in itertools.product(claim.tasks, claim.multiples, claim.variants, baselines):
        section = tasks.get(task)
        lengths = dict(zip(section.data.multiples, section.data.lengths, strict=True)) if section else {}
        metric = claim.metric or (PRIMARY[section.data.goal] if section else "")
        rival: Side | None = None
        if isinstance(baseline, float):
            baseline_name = f"{baseline:g}"
        elif isinstance(baseline, str):
            baseline_name, rival = baseline, Side(baseline, multiple)
        elif claim.test in SHARE_TESTS:
            baseline_name = f"{claim.threshold:g} of the seeds"
        else:
            assert claim.baseline_multiple is not None
            baseline_name, rival = f"itself at {claim.baseline_multiple:g}x", Side(variant, claim.baseline_multiple)
        blank = Comparison(name, task, metric, lengths.get(multiple, 0), variant, baseline_name)
        sides = [Side(variant, multiple), *([rival] if rival else [])]
        keys = [(task, metric, side.variant, lengths.get(side.multiple, 0)) for side in sides]
        if faults := [fault for side, key in zip(sides, keys, strict=True) if (fault := _missing(evidence, claim, side, key))]:
            yield blank._replace(reason=faults[0])
            continue
        number = baseline if isinstance(baseline, float) else 0.0
        yield _compare(evidence, blank, claim, keys, number)


def _missing(evidence: Evidence, claim: Claim, side: Side, key: tuple[str, str, str, int]) -> str | None:
    """Why a side cannot be compared, or None."""
    task, metric, variant, length = key
    values = evidence.values.get(key)
    if not length or values is None:
        return f"{ABSENT} {metric or 'score'} of {side.variant} on {task} at {side.multiple:g}x"
    if claim.test in COUNT_TESTS and evidence.study.tasks[task].data.goal != "accuracy":
        return f"{ABSENT} accuracy to count seeds of {side.variant} on {task} at {side.multiple:g}x"
    if claim.test in COUNT_TESTS and isinstance(evidence.study.variants[variant], ConstructionConfig):
        return None
    if claim.test not in COUNT_TESTS and np.isnan(values).any():
        return f"{side.variant} diverged on {task} with {np.isnan(values).sum()} of {len(values)} seeds"
    return f"too few seeds: {len(values)} of {claim.min_seeds}" if len(values) < claim.min_seeds else None


def _compare(
    evidence: Evidence, blank: Comparison, claim: Claim, keys: list[tuple[str, str, str, int]], number: float
) -> Comparison:
    """The comparison with its effect, interval, counts, p values and verdict."""
    data = evidence.study.tasks[blank.task].data
    counted = data.goal == "accuracy" and (blank.metric == "accuracy" or claim.test in COUNT_TESTS)
    counts = [evidence.count(*key, claim.solved_at) for key in keys] if counted else []
    variant, baseline, *_ = *counts, _NOT_COUNTED, _NOT_COUNTED
    if claim.test in SHARE_TESTS:
        effect = share(variant, claim.threshold)
    elif claim.test in COUNT_TESTS:
        effect = share_difference(variant, baseline)
    else:
        samples = [evidence.sample(*key) for key in keys]
        test = bootstrap if blank.metric in SKEWED and all(sample.sequences for sample in samples) else difference
        effect = test(samples, claim.threshold, paired=claim.baseline_multiple is not None, number=number)
    seeds = min(len(evidence.values[key]) for key in keys)
    holds, fails = _sides(effect, claim)
    reasons = [] if holds or fails else ["interval includes the threshold"]
    if math.isnan(effect.p_above) and (holds or fails):
        # Of n runs without an exception, a share of up to this much may be exceptions.
        bound = 1 - share_interval(Count(seeds, seeds))[0]
        reasons.append(f"{'held' if holds else 'failed'} in all {seeds} runs (rate of exceptions up to {bound:.2f})")
    if counted and claim.test not in COUNT_TESTS and len(keys) > 1:
        means = [float(evidence.values[key].mean()) for key in keys]
        lower = keys[means.index(min(means))]
        if label := evidence.shortcut(lower[0], lower[3], min(means)):
            reasons.append(f"{lower[2]} is no better than: {label}")
        if min(means) >= SOLVED_AT:
            reasons.append(f"both accuracies are at least {SOLVED_AT:g}, so metric: loss tells more")
    return blank._replace(
        k=variant.solved,
        n=variant.of,
        baseline_k=baseline.solved,
        baseline_n=baseline.of,
        effect=effect.value,
        low=effect.low,
        high=effect.high,
        p_for=effect.p_above if claim.sign > 0 else effect.p_below,
        p_against=effect.p_below if claim.sign > 0 else effect.p_above,
        seeds=seeds,
        verdict="supported" if holds else "contradicted" if fails else "undecided",
        reason="; ".join(reasons),
    )


def _sides(effect: Effect, claim: Claim) -> tuple[bool, bool]:
    """Whether the effect is beyond the threshold on the side of the claim, and on the other one."""
    if math.isnan(effect.p_above):
        above, below = effect.value > claim.threshold, effect.value < claim.threshold
    else:  # half of LEVEL on each side, as outside the interval
        above, below = effect.p_above <= LEVEL / 2, effect.p_below <= LEVEL / 2
    return (above, below) if claim.sign > 0 else (below, above)


def decide(claims: dict[str, Claim], comparisons: dict[str, list[Comparison]]) -> pd.DataFrame:
    """One row per claim: its verdict, and the comparison that decides it or is furthest from it."""
    families = {name: _p_values(rows) for name, rows in comparisons.items()}
    p: dict[tuple[str, int], float] = {}
    for side in (0, 1):
        known = [(name, side) for name, pair in families.items() if not math.isnan(pair[side])]
        corrected = stats.false_discovery_control([families[name][side] for name, _ in known], method="bh") if known else []
        p |= zip(known, map(float, corrected), strict=True)
    rows = []
    for name, claim in claims.items():
        made = comparisons[name]
        p_for, p_against = (p.get((name, side), math.nan) for side in (0, 1))
        verdict, row, reason = _verdict(claim, made, p_for, p_against)
        rows.append(
            {
                "claim": name, "statement": claim.statement, "source": claim.source, "verdict": verdict, "reason": reason,
                "effect": row.effect, "low": row.low, "high": row.high, "p": p_against if verdict == "contradicted" else p_for,
                "seeds": row.seeds, "comparisons": len(made), "ablation": claim.ablation, "test": claim.test,
                "k": row.k, "n": row.n, "baseline_k": row.baseline_k, "baseline_n": row.baseline_n,
                "registered": f"{claim.registered}", "revised": " ".join(map(_revision, claim.revised)),
            }
        )  # fmt: skip
    return pd.DataFrame(rows, columns=[*CLAIM_COLUMNS])


def _revision(revision: Revision) -> str:
    return f"{revision.date}: {revision.reason} Before: {revision.was} ({revision.verdict})."


def _p_values(rows: list[Comparison]) -> tuple[float, float]:
    """(p for the claim, p against it): nan if nothing was tested; the first also if a comparison is missing."""
    tested = [row for row in rows if not math.isnan(row.p_for)]
    if not tested:
        return math.nan, math.nan
    decidable = not any(math.isnan(row.effect) for row in rows)
    against = min(row.p_against for row in tested)
    return max(row.p_for for row in tested) if decidable else math.nan, min(1.0, against * len(rows))


def _verdict(claim: Claim, rows: list[Comparison], p_for: float, p_against: float) -> tuple[Verdict, Comparison, str]:
    """The verdict, the comparison that shows it, and the reason in words."""

    def margin(row: Comparison) -> tuple[float, float]:
        return claim.sign * (row.effect - claim.threshold), row.low if claim.sign > 0 else -row.high

    def place(row: Comparison) -> str:
        against = "" if claim.test in SHARE_TESTS else f" against {row.baseline}"
        return f"{row.variant}{against} on {row.task} at length {row.length}"

    def noted(row: Comparison) -> str:
        return "; ".join(filter(None, (place(row), row.reason)))

    measured = [row for row in rows if row.seeds and not math.isnan(row.effect)]
    worst = min(measured, key=margin, default=rows[0])
    against = [row for row in measured if row.verdict == "contradicted"]
    # If no seed and no sequence differs, nothing is tested, and the number alone contradicts the claim.
    if against and (not p_against > LEVEL or any(math.isnan(row.p_against) for row in against)):
        worst = min(against, key=margin)
        part = "" if len(against) == len(rows) else f"; {len(against)} of {len(rows)} comparisons"
        return "contradicted", worst, noted(worst) + part
    missing = [row.reason for row in rows if math.isnan(row.effect)]
    if missing:
        return "undecided", worst, missing[0]
    unsupported = [row for row in rows if row.verdict != "supported"]
    if unsupported:
        first = min(unsupported, key=margin)
        fault, *notes = first.reason.split("; ")
        return "undecided", first, "; ".join([f"{fault}: {place(first)}", *notes])
    if p_for > LEVEL:
        least_sure = max((row for row in rows if not math.isnan(row.p_for)), key=lambda row: row.p_for)
        return "undecided", least_sure, f"not significant after correction for all claims: {place(least_sure)}"
    parts = [f"smallest margin: {noted(worst)}" if len(rows) > 1 else noted(worst)]
    if 0 < (untested := sum(math.isnan(row.p_for) for row in rows)) < len(rows):
        parts.append(f"nothing varies in {untested} of {len(rows)} comparisons")
    return "supported", worst, "; ".join(parts)
