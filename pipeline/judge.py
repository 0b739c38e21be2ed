"""verdicts/: every claim of claims.yaml supported, contradicted or undecided by the results, and why.

An effect is the mean over seeds of the variant's metric less that of the other side. Its interval is a bootstrap over seeds and,
crossed with them, over the test sequences, which all seeds and variants share; its test is Student's over seeds (Welch's between
variants, paired between two lengths of one, against the number otherwise), since three seeds are too few for a bootstrap alone.
A claim is supported where all of its comparisons are, contradicted where one of them is. Its two p values, the largest for it
and the smallest, times the number of comparisons, against it, are corrected for all claims (Benjamini and Yekutieli).
"""

from __future__ import annotations

import functools
import itertools
import math
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from pipeline import readers
from pipeline.claims import Claim
from pipeline.files import SCORES, VERDICTS, whole
from pipeline.params import Study
from pipeline.results import PRIMARY, read_results
from pipeline.verdicts import ABSENT

LEVEL = 0.05
"""Of the verdicts given, the share that is wrong in expectation; one less the coverage of an interval."""
RESAMPLES = 2000
Verdict = Literal["supported", "contradicted", "undecided"]
Floats = NDArray[np.floating[Any]]


class Side(NamedTuple):
    """A variant at a length."""

    variant: str
    multiple: float


class Comparison(NamedTuple):
    """A variant against the other side, and what the results say of it."""

    claim: str
    task: str
    metric: str
    length: int
    variant: str
    than: str
    effect: float = math.nan
    low: float = math.nan
    high: float = math.nan
    p_for: float = math.nan
    """Of an effect as large if the claim were not true of it; nan where no seed differs from another, and nothing is tested."""
    p_against: float = math.nan
    seeds: int = 0
    """The fewer of the two sides."""
    verdict: Verdict = "undecided"
    reason: str = ""


class Evidence:
    """The results of a study: metrics by seed, and what the primary ones are means of, sequence by sequence."""

    def __init__(self, study: Study, results: pd.DataFrame, sequences: Mapping[str, Mapping[str, Floats]]):
        self.study, self.sequences = study, sequences
        keys = ["task", "metric", "variant", "length"]
        by_seed = results.sort_values("seed").groupby(keys, sort=False)["value"]
        self.values: dict[Any, Floats] = {key: values.to_numpy(float) for key, values in by_seed}

    @classmethod
    def read(cls, study: Study) -> Evidence:
        """From the files. Raises ValueError where a cell of the study has no results."""
        sequences = {}
        for task in study.tasks:
            sequences[task] = {name: array.astype(float) for name, array in readers.arrays(SCORES / f"{task}.npz").items()}
        return cls(study, read_results(study), sequences)

    def resamples(self, task: str, metric: str, variant: str, length: int) -> Floats:
        """RESAMPLES means by seed over test sequences drawn anew, the same ones for all variants of a length."""
        values = self.values[task, metric, variant, length]
        draws = np.tile(values, (RESAMPLES, 1))
        if metric != PRIMARY[self.study.tasks[task].data.goal]:
            return draws  # is no mean over sequences
        for place, seed in enumerate(sorted(self.study.seeds)):
            columns = self.sequences.get(task, {}).get(f"{variant}/{seed}/{length}")
            if columns is not None:
                counts = _counts(columns.shape[1], length)
                draws[:, place] = (counts @ columns[0]) / (counts @ columns[1])
        return draws


@functools.lru_cache(maxsize=16)
def _counts(sequences: int, length: int) -> Floats:
    """How often each sequence is drawn in each resample."""
    rng = np.random.default_rng([sequences, length])
    return rng.multinomial(sequences, np.full(sequences, 1 / sequences), size=RESAMPLES).astype(float)


def judge(study: Study, claims: dict[str, Claim]) -> None:
    """Writes verdicts/: comparisons.csv, and claims.csv with a row a claim."""
    evidence = Evidence.read(study)
    comparisons = {name: list(compare(evidence, name, claim)) for name, claim in claims.items()}
    verdicts = decide(claims, comparisons)
    with whole(VERDICTS) as folder:
        folder.mkdir()
        rows = itertools.chain.from_iterable(comparisons.values())
        for name, table in (("comparisons", pd.DataFrame(rows, columns=Comparison._fields)), ("claims", verdicts)):
            table.to_csv(folder / f"{name}.csv", index=False, lineterminator="\n", float_format="%.6g")


def compare(evidence: Evidence, name: str, claim: Claim) -> Iterator[Comparison]:
    """Every comparison that the claim is made of."""
    tasks = evidence.study.tasks
    others: tuple[str | float | None, ...] = claim.than if isinstance(claim.than, tuple) else (claim.than,)
    for task, multiple, variant, other in itertools.product(claim.tasks, claim.multiples, claim.variants, others):
        section = tasks.get(task)
        lengths = dict(zip(section.data.multiples, section.data.lengths, strict=True)) if section else {}
        metric = claim.metric or (PRIMARY[section.data.goal] if section else "")
        rival: Side | None = None
        if isinstance(other, float):
            than = f"{other:g}"
        elif isinstance(other, str):
            than, rival = other, Side(other, multiple)
        else:
            assert claim.than_multiple is not None
            than, rival = f"itself at {claim.than_multiple:g}x", Side(variant, claim.than_multiple)
        blank = Comparison(name, task, metric, lengths.get(multiple, 0), variant, than)
        sides = [Side(variant, multiple), *([rival] if rival else [])]
        keys = [(task, metric, side.variant, lengths.get(side.multiple, 0)) for side in sides]
        if faults := [fault for side, key in zip(sides, keys, strict=True) if (fault := _gap(evidence, claim, side, key))]:
            yield blank._replace(reason=faults[0])
            continue
        values = [evidence.values[key] for key in keys]
        draws = [evidence.resamples(*key) for key in keys]
        number = other if isinstance(other, float) else 0.0
        yield _measured(blank, claim, values, draws, paired=claim.than_multiple is not None, number=number)


def _gap(evidence: Evidence, claim: Claim, side: Side, key: tuple[str, str, str, int]) -> str | None:
    """Why nothing can be said of a side, in words."""
    task, metric, _, length = key
    values = evidence.values.get(key)
    if not length or values is None:
        return f"{ABSENT} {metric or 'score'} of {side.variant} on {task} at {side.multiple:g}x"
    if np.isnan(values).any():
        return f"{side.variant} diverged on {task} with {np.isnan(values).sum()} of {len(values)} seeds"
    return f"too few seeds: {len(values)} of {claim.seeds}" if len(values) < claim.seeds else None


def _measured(
    blank: Comparison, claim: Claim, values: list[Floats], draws: list[Floats], *, paired: bool, number: float
) -> Comparison:
    """The comparison with its effect, interval, p values and verdict."""
    rng = np.random.default_rng(0)
    chosen = [rng.integers(len(v), size=(RESAMPLES, len(v))) for v in values]
    if paired:
        chosen = chosen[:1] * 2
    means = [np.take_along_axis(draw, seeds, axis=1).mean(1) for draw, seeds in zip(draws, chosen, strict=True)]
    resampled = means[0] - (means[1] if len(means) > 1 else number)
    effect = values[0].mean() - (values[1].mean() if len(values) > 1 else number)
    low, high = np.quantile(resampled, [LEVEL / 2, 1 - LEVEL / 2])
    tests = {side: _test(values, claim.threshold + number, paired=paired, side=side) for side in (1, -1)}
    above, below = low > claim.threshold, high < claim.threshold
    holds, fails = (above, below) if claim.sign > 0 else (below, above)
    p_for, p_against = tests[claim.sign], tests[-claim.sign]
    verdict: Verdict = "undecided"
    if holds and not p_for > LEVEL:
        verdict = "supported"
    elif fails and not p_against > LEVEL:
        verdict = "contradicted"
    reason = "" if verdict != "undecided" else "interval across the threshold" if not (holds or fails) else "not significant"
    return blank._replace(
        effect=effect,
        low=low,
        high=high,
        p_for=p_for,
        p_against=p_against,
        seeds=min(map(len, values)),
        verdict=verdict,
        reason=reason,
    )


def _test(values: list[Floats], threshold: float, *, paired: bool, side: int) -> float:
    """Student's p value of an effect above (side 1) or below (-1) `threshold`; nan where no seed differs from another."""
    if paired:
        values = [values[0] - values[1]]
    if not any(np.ptp(v) > 0 for v in values):
        return math.nan
    alternative = "greater" if side > 0 else "less"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # scipy warns of values that are nearly equal
        if len(values) == 1:
            return float(stats.ttest_1samp(values[0], threshold, alternative=alternative).pvalue)
        return float(stats.ttest_ind(values[0] - threshold, values[1], equal_var=False, alternative=alternative).pvalue)


def decide(claims: dict[str, Claim], comparisons: dict[str, list[Comparison]]) -> pd.DataFrame:
    """A row a claim: its verdict, with the comparison that decides it or is furthest from doing so."""
    families = {name: _p_values(rows) for name, rows in comparisons.items()}
    known = [(name, side) for name, pair in families.items() for side in (0, 1) if not math.isnan(pair[side])]
    corrected = stats.false_discovery_control([families[name][side] for name, side in known], method="by") if known else []
    p = dict(zip(known, map(float, corrected), strict=True))
    rows = []
    for name, claim in claims.items():
        here = comparisons[name]
        p_for, p_against = (p.get((name, side), math.nan) for side in (0, 1))
        verdict, row, reason = _verdict(claim, here, p_for, p_against)
        rows.append(
            {
                "claim": name, "says": claim.says, "source": claim.source, "verdict": verdict, "reason": reason,
                "effect": row.effect, "low": row.low, "high": row.high, "p": p_against if verdict == "contradicted" else p_for,
                "seeds": row.seeds, "comparisons": len(here), "figure": claim.figure,
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def _p_values(rows: list[Comparison]) -> tuple[float, float]:
    """For the claim and against it; nan where nothing was tested."""
    tested = [row for row in rows if not math.isnan(row.p_for)]
    against = min((row.p_against for row in tested), default=math.nan)
    return max((row.p_for for row in tested), default=math.nan), min(1.0, against * len(rows)) if tested else math.nan


def _verdict(claim: Claim, rows: list[Comparison], p_for: float, p_against: float) -> tuple[Verdict, Comparison, str]:
    """The verdict, the comparison that it is shown by, and the reason in words."""

    def margin(row: Comparison) -> float:
        return claim.sign * (row.effect - claim.threshold)

    measured = [row for row in rows if row.seeds and not math.isnan(row.effect)]
    worst = min(measured, key=margin, default=rows[0])
    lost = [row for row in measured if row.verdict == "contradicted"]
    where = f"{worst.variant} against {worst.than} on {worst.task} at length {worst.length}"
    # A contradiction that no seed varies in is not tested, and stands by itself.
    if lost and (not p_against > LEVEL or any(math.isnan(row.p_against) for row in lost)):
        worst = min(lost, key=margin)
        where = f"{worst.variant} against {worst.than} on {worst.task} at length {worst.length}"
        return "contradicted", worst, where if len(lost) == len(rows) else f"{where}; {len(lost)} of {len(rows)} comparisons"
    gaps = [row.reason for row in rows if math.isnan(row.effect)]
    if gaps:
        return "undecided", worst, gaps[0]
    open_ones = [row for row in rows if row.verdict != "supported"]
    if open_ones:
        first = min(open_ones, key=margin)
        return (
            "undecided",
            first,
            f"{first.reason}: {first.variant} against {first.than} on {first.task} at length {first.length}",
        )
    if p_for > LEVEL:
        return "undecided", worst, "not significant once corrected for all claims"
    return "supported", worst, f"smallest: {where}" if len(rows) > 1 else where
