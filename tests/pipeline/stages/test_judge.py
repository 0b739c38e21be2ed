"""Verdicts on planted results: every test and every verdict; noise decides nothing; bad claims give one-line errors."""

import datetime
import itertools
import math
import shutil
from io import StringIO
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from ruamel.yaml import YAML
from scipy import stats

from pipeline.commands.show import show
from pipeline.config import claims
from pipeline.config.claims import Claim
from pipeline.config.errors import ParamsError
from pipeline.config.grid import cells, seeds_of, variants_on
from pipeline.config.load import load_study
from pipeline.reporting.verdicts import left_out, of_the_study, registration_table, verdict_table
from pipeline.stages.judge import SKEWED, Comparison, Evidence, compare, decide
from pipeline.storage.results import read_results
from pipeline.storage.scores import read_scores
from tests.helpers.study import ROOT, stage

DEFAULT, TEXT = load_study(ROOT / "params.yaml"), load_study(ROOT / "presets" / "text-cpu.yaml")


def with_seeds(study, count):
    """The study with this number of seeds of every cell, from 0 on, all of which decide claims."""
    training = {cell: made.model_copy(update={"seeds": tuple(range(count))}) for cell, made in study.training.items()}
    return study.model_copy(update={"training": training, "verdict_seeds_from": 0})


CLAIMS = claims.load(ROOT / "claims.yaml")
STUDY, TEN = with_seeds(DEFAULT, 3), with_seeds(DEFAULT, 10)
LENGTH = STUDY.tasks["ar"].data.length
SEQUENCES, TARGETS = 64, 8
FUTURE = datetime.datetime.now(datetime.UTC).date() + datetime.timedelta(days=2)


def claim(**changes):
    fields = {
        "statement": "k beats none.", "source": "ours", "tasks": ("ar",), "multiples": (1.0,), "variants": ("k",),
        "baseline": ("none",), "test": "superior", "margin": 0.1, "min_seeds": 3, "ablation": "qkv_subsets",
        "registered": datetime.date(2026, 11, 25),
    }  # fmt: skip
    return Claim(**(fields | changes))


def planted(scores, *, task="ar", length=LENGTH, metric="accuracy", noise=0.0, seed=0, study=STUDY):
    """Evidence with these values per variant and seed; `noise` scatters the scores of the sequences around them."""
    rng = np.random.default_rng(seed)
    rows, sequences = [], {}
    for name, values in scores.items():
        variant, at_length = name if isinstance(name, tuple) else (name, length)
        for number, value in enumerate(values):
            correct = TARGETS * (value + noise * rng.standard_normal(SEQUENCES))
            correct += TARGETS * value - correct.mean()
            sequences[variant, number, at_length] = np.stack([correct, np.full(SEQUENCES, TARGETS)])
            rows.append((task, variant, number, at_length, metric, value))
    columns = ["task", "variant", "seed", "length", "metric", "value"]
    return Evidence(study, pd.DataFrame(rows, columns=columns), {task: {metric if metric in SKEWED else "accuracy": sequences}})


def random_results(study, rng):
    """Results that do not depend on the variant: mostly near 0 or 1, and lower at longer lengths."""
    metrics = {made.metric for made in CLAIMS.values()} | {"accuracy"}
    rows = [
        (cell.task, cell.variant, seed, length, metric, rng.beta(0.5, 0.5) ** max(1, multiple**0.25), multiple)
        for cell in cells(study)
        for seed in seeds_of(study, cell.task, cell.variant)
        for multiple, length in zip(study.tasks[cell.task].data.multiples, study.tasks[cell.task].data.lengths, strict=True)
        for metric in sorted(metrics - {None})
    ]
    return pd.DataFrame(rows, columns=["task", "variant", "seed", "length", "metric", "value", "multiple"])


def verdict(evidence, **changes):
    claims = {"it": claim(**changes)}
    (row,) = decide(claims, {"it": list(compare(evidence, "it", claims["it"]))}).to_dict("records")
    return row


LOW, HIGH = [0.10, 0.12, 0.11], [0.90, 0.92, 0.91]


@pytest.mark.parametrize(
    ("scores", "changes", "expected"),
    [
        ({"k": HIGH, "none": LOW}, {}, "supported"),
        ({"k": LOW, "none": HIGH}, {}, "contradicted"),
        ({"k": [0.50, 0.52, 0.51], "none": [0.49, 0.51, 0.50]}, {}, "contradicted"),  # a difference that does not matter
        ({"k": [0.2, 0.9, 0.5], "none": [0.4, 0.1, 0.3]}, {}, "undecided"),
        ({"k": [0.90, 0.91], "none": [0.10, 0.11]}, {}, "undecided"),
        ({"k": [0.9, math.nan, 0.9], "none": LOW}, {}, "undecided"),
        ({"k": HIGH}, {}, "undecided"),
        ({"k": LOW, "none": HIGH}, {"test": "inferior"}, "supported"),
        ({"k": HIGH, "none": LOW}, {"test": "inferior"}, "contradicted"),
        ({"k": [0.50, 0.52, 0.51], "none": [0.49, 0.51, 0.50]}, {"test": "non_inferior"}, "supported"),
        ({"k": [0.50, 0.52, 0.51], "none": [0.49, 0.51, 0.50]}, {"test": "non_superior"}, "supported"),
        ({"k": LOW, "none": HIGH}, {"test": "non_inferior"}, "contradicted"),
        ({"k": HIGH, "none": LOW}, {"test": "non_superior"}, "contradicted"),
        ({"k": HIGH}, {"baseline": 0.7}, "supported"),
        ({"k": LOW}, {"baseline": 0.7}, "contradicted"),
        ({"k": [0.7, 0.95, 0.8]}, {"baseline": 0.7}, "undecided"),
        ({"k": [1.0, 1.0, 1.0]}, {"baseline": 1.0, "test": "non_inferior"}, "supported"),  # nothing varies, nothing to test
        ({"k": [0.8, 0.8, 0.8]}, {"baseline": 1.0, "test": "non_inferior"}, "contradicted"),
        (
            {"k": HIGH, ("k", 8 * LENGTH): [0.89, 0.91, 0.90]},
            {"baseline": None, "baseline_multiple": 8.0, "test": "non_superior"},
            "supported",
        ),
        (
            {"k": HIGH, ("k", 8 * LENGTH): LOW},
            {"baseline": None, "baseline_multiple": 8.0, "test": "non_superior"},
            "contradicted",
        ),
        ({"k": HIGH, "none": LOW, "q": HIGH}, {"baseline": ("none", "q")}, "contradicted"),  # true of none, false of q
        ({"k": HIGH, "none": LOW, "q": [0.2, 0.9, 0.5]}, {"baseline": ("none", "q")}, "undecided"),
    ],
)
def test_planted_results_get_the_planted_verdict(scores, changes, expected):
    assert verdict(planted(scores), **changes)["verdict"] == expected


def test_an_undecided_claim_has_a_reason():
    def reason(scores, **changes):
        return verdict(planted(scores), **changes)["reason"]

    assert reason({"k": [0.9, 0.9], "none": [0.1, 0.1]}) == "too few seeds: 2 of 3"
    assert reason({"k": [0.9, math.nan, 0.9], "none": LOW}) == "k diverged on ar with 1 of 3 seeds"
    assert reason({"k": HIGH}) == "the study has no accuracy of none on ar at 1x"
    assert reason({"k": HIGH}, tasks=("absent",)) == "the study has no score of k on absent at 1x"
    assert reason({"k": HIGH, "none": LOW}, multiples=(3.0,)) == "the study has no accuracy of k on ar at 3x"
    assert reason({"k": [0.2, 0.9, 0.5], "none": [0.4, 0.1, 0.3]}).startswith("interval includes the threshold: k against none")


def test_the_effect_is_the_difference_of_means_and_lies_in_its_interval():
    row = verdict(planted({"k": HIGH, "none": LOW}, noise=0.1))
    assert row["effect"] == pytest.approx(np.mean(HIGH) - np.mean(LOW))
    assert row["low"] < row["effect"] < row["high"]


def test_the_interval_and_the_test_count_sequences_as_well_as_seeds():
    still, noisy = (verdict(planted({"k": HIGH, "none": LOW}, noise=noise)) for noise in (0, 2))
    assert still["high"] - still["low"] < 0.06
    assert noisy["high"] - noisy["low"] > 0.5
    assert noisy["p"] > 100 * still["p"]


def test_an_interval_over_sequences_only_is_that_of_the_paired_t_test():
    """Seeds and variants share the sequences, so a sequence that is easy for all of them is no evidence."""
    evidence = planted({"k": [0.5] * 3, "none": [0.2] * 3}, noise=0.3)
    sums = evidence.sequences["ar"]["accuracy"]
    correct = [np.mean([sums[name, seed, LENGTH][0] for seed in range(3)], axis=0) for name in ("k", "none")]
    expected = stats.ttest_rel(*(counts / TARGETS for counts in correct))
    row = verdict(evidence)
    assert (row["low"], row["high"]) == pytest.approx(tuple(expected.confidence_interval()), abs=0.005)


def test_sequences_equally_hard_for_both_sides_are_no_evidence():
    evidence = planted({"k": [0.5] * 3, "none": [0.2] * 3}, noise=0.3)
    for seed in range(3):
        sums = evidence.sequences["ar"]["accuracy"]
        sums["none", seed, LENGTH] = sums["k", seed, LENGTH] - [[0.3 * TARGETS], [0]]
    row = verdict(evidence)
    assert row["high"] - row["low"] == pytest.approx(0, abs=1e-9)


def test_degrees_of_freedom_are_those_of_welch_and_satterthwaite():
    values = {"k": [0.55, 0.61, 0.52], "none": [0.20, 0.23, 0.24]}
    evidence = planted(values, noise=0.5)
    sides = [evidence.sample("ar", "accuracy", name, LENGTH) for name in values]
    parts = [np.var(seeds, ddof=1) / 3 for seeds in values.values()]
    parts.append(np.var(sides[0].resampled.mean(1) - sides[1].resampled.mean(1), ddof=1))
    assert 0.1 < parts[2] / sum(parts) < 0.9
    freedom = sum(parts) ** 2 / (parts[0] ** 2 / 2 + parts[1] ** 2 / 2 + parts[2] ** 2 / (SEQUENCES - 1))
    error, (row,) = math.sqrt(sum(parts)), compare(evidence, "it", claim())
    assert (row.low, row.high) == pytest.approx(stats.t.interval(0.95, freedom, row.effect, error))
    assert row.p_for == pytest.approx(stats.t.sf((row.effect - 0.1) / error, freedom))


@pytest.mark.parametrize(
    ("scores", "changes", "test"),
    [
        ({"k": HIGH, "none": [0.1, 0.3, 0.2]}, {}, lambda k, none: stats.ttest_ind(k, none, equal_var=False)),
        ({"k": HIGH, ("k", 8 * LENGTH): [0.75, 0.85, 0.8]}, {"baseline": None, "baseline_multiple": 8.0}, stats.ttest_rel),
        ({"k": HIGH}, {"baseline": 0.2}, lambda k: stats.ttest_1samp(k - 0.2, 0)),
        ({"k": [0.3, 0.4, 0.6], "none": [0.2] * 3}, {}, lambda k, none: stats.ttest_1samp(k - none, 0)),
    ],
)
@pytest.mark.parametrize(("metric", "noise"), [(None, 0), ("attention_entropy_1", 0.5)])
def test_with_variance_over_seeds_only_it_is_the_t_test(scores, changes, test, metric, noise):
    """Paired for two lengths; Welch's for two variants, where a variant without variance equals a number."""
    expected = test(*map(np.array, scores.values()))
    evidence = planted(scores, metric=metric or "accuracy", noise=noise)
    (row,) = compare(evidence, "it", claim(margin=0.0, metric=metric, **changes))
    assert (row.low, row.high) == pytest.approx(tuple(expected.confidence_interval()))
    assert 2 * min(row.p_for, row.p_against) == pytest.approx(expected.pvalue)
    assert row.p_for < row.p_against


def test_the_interval_and_the_test_agree():
    """If the threshold is a bound of the interval, p is half of 5 %."""
    evidence = planted({"k": HIGH, "none": [0.3, 0.4, 0.35]}, noise=0.3)
    (row,) = compare(evidence, "it", claim())
    for test, bound in (("superior", row.low), ("non_superior", row.high)):
        (at_bound,) = compare(evidence, "it", claim(margin=bound, test=test))
        assert at_bound.p_for == pytest.approx(0.025)


@pytest.mark.parametrize(
    ("solved", "changes", "expected"),
    [
        ({"k": 10}, {"test": "solved"}, "supported"),
        ({"k": 9}, {"test": "solved"}, "supported"),
        ({"k": 8}, {"test": "solved"}, "undecided"),
        ({"k": 1}, {"test": "solved"}, "contradicted"),
        ({"k": 1}, {"test": "unsolved"}, "supported"),
        ({"k": 10}, {"test": "unsolved"}, "contradicted"),
        ({"k": 10}, {"test": "solved", "share": 0.8}, "undecided"),
        ({"k": 1}, {"test": "solved", "solved_at": 0.3}, "supported"),
        ({"k": 10, "none": 2}, {"test": "solved_more", "baseline": ("none",)}, "supported"),
        ({"k": 10, "none": 8}, {"test": "solved_more", "baseline": ("none",)}, "undecided"),
        ({"k": 2, "none": 10}, {"test": "solved_more", "baseline": ("none",)}, "contradicted"),
        ({"k": 2, "none": 10}, {"test": "solved_less", "baseline": ("none",)}, "supported"),
    ],
)
def test_seeds_are_counted(solved, changes, expected):
    scores = {variant: [0.995] * count + [0.4] * (10 - count) for variant, count in solved.items()}
    row = verdict(planted(scores, study=TEN), **{"margin": None, "baseline": None, **changes})
    assert row["verdict"] == expected
    assert (row["k"], row["n"]) == (10 if "solved_at" in changes else solved["k"], 10)
    assert row["low"] <= row["effect"] <= row["high"]


def test_a_diverged_seed_has_not_solved_its_task():
    row = verdict(planted({"k": [1.0] * 9 + [math.nan]}, study=TEN), test="solved", baseline=None, margin=None)
    assert (row["k"], row["n"], row["verdict"]) == (9, 10, "supported")
    shown = verdict_table(pd.DataFrame([row]))
    assert shown["effect (95 % interval)"].tolist() == ["9 of 10 (0.555 to 0.997)"]


def test_the_sequences_of_a_construction_are_counted():
    """One construction with three equal seeds is one model."""
    row = verdict(planted({"construction": [1.0] * 3}), variants=("construction",), test="solved", baseline=None, margin=None)
    assert (row["k"], row["n"], row["verdict"]) == (SEQUENCES, SEQUENCES, "supported")


def test_the_first_seeds_decide_nothing_if_others_confirm():
    confirmed = STUDY.model_copy(update={"verdict_seeds_from": 3, "training": TEN.training})
    low, high = [*LOW, *LOW, 0.1], [*HIGH, *HIGH, 0.9]
    scores = {"k": [*LOW, *high], "none": [*HIGH, *low]}
    row = verdict(planted(scores, study=confirmed))
    assert (row["verdict"], row["seeds"]) == ("supported", 7)
    assert row["effect"] == pytest.approx(np.mean(high) - np.mean(low))


def test_a_comparison_at_the_ceiling_says_so():
    rows = [*compare(planted({"k": [0.995, 0.999, 1.0], "none": [0.992, 0.995, 0.999]}), "it", claim(test="non_inferior"))]
    assert rows[0].reason == "both accuracies are at least 0.99, so metric: loss tells more"
    assert not next(compare(planted({"k": HIGH, "none": LOW}), "it", claim())).reason


def test_a_comparison_with_a_shortcut_names_it():
    evidence = planted({"k": HIGH, "none": [0.15, 0.16, 0.17]})
    values = {"guess_value": 0.17, "guess_any": 0.02}
    rows = [{"task": "ar", "reference": name, "length": LENGTH, "value": value} for name, value in values.items()]
    evidence.references = pd.DataFrame(rows)
    label = STUDY.tasks["ar"].data.reference_labels["guess_value"]
    assert next(compare(evidence, "it", claim())).reason == f"none is no better than: {label} (0.170)"


@pytest.mark.parametrize(("metric", "task", "study"), [("loss", "ar", STUDY), ("bits_per_byte", "text", TEXT)])
def test_losses_are_resampled_by_seed_and_sequence(metric, task, study):
    scores = {"qk": [0.50, 0.53, 0.51], "none": [0.70, 0.72, 0.75]}
    options = {"metric": metric, "tasks": (task,), "variants": ("qk",), "test": "inferior", "margin": 0.01}
    made = {"task": task, "length": study.tasks[task].data.length, "metric": metric, "study": study}
    still, noisy = (verdict(planted(scores, noise=noise, **made), **options) for noise in (0, 1))
    assert still["verdict"] == "supported"
    assert noisy["high"] - noisy["low"] > 1.5 * (still["high"] - still["low"]) > 0
    assert math.isnan(still["k"])


def test_a_verdict_shows_its_earlier_wordings():
    revised = {"date": datetime.date(2026, 11, 27), "reason": "It failed.", "was": "k is best", "verdict": "contradicted"}
    row = verdict(planted({"k": HIGH, "none": LOW}), revised=(revised,))
    shown = registration_table(pd.DataFrame([row]))
    assert shown["registered"].tolist() == ["2026-11-25"]
    assert shown["revised"].tolist() == ["2026-11-27: It failed. Before: k is best (contradicted)."]


def test_a_changed_claim_needs_an_entry():
    old = {"it": claim(), "other": claim(), "gone": claim()}
    entry = {"date": datetime.date(2026, 11, 27), "reason": "It failed.", "was": "margin 0.1", "verdict": "contradicted"}
    silent, told = claim(margin=0.2), claim(margin=0.2, revised=(entry,))
    assert claims.unrevised(old, {"it": silent, "other": claim(ablation="width"), "new": claim()}) == ["it"]
    assert claims.unrevised(old, {"it": told}) == []
    assert claims.unrevised({"it": told}, {"it": claim(margin=0.3, revised=(entry,))}) == ["it"]


def test_too_few_seeds_for_a_count_are_reported():
    share = claim(test="solved", margin=None, baseline=None)
    assert (share.fewest_seeds, claim(test="solved", margin=None, baseline=None, share=0.8).fewest_seeds) == (6, 17)
    assert list(claims.undecided({"it": share}, STUDY)) == ["it: this study has 3 seeds, fewer than test = solved needs: 6"]
    assert not list(claims.undecided({"it": share}, TEN))


def test_an_interval_over_many_seeds_has_95_percent_coverage():
    seeds = np.random.default_rng(0).standard_normal(200)
    row = verdict(planted({"k": seeds}, metric="attention_entropy_1"), metric="attention_entropy_1", baseline=0.2)
    assert row["high"] - row["low"] == pytest.approx(2 * 1.96 * seeds.std() / math.sqrt(len(seeds)), rel=0.01)


def test_nothing_is_tested_if_no_seed_and_no_sequence_differs():
    (row,) = compare(planted({"k": [0.8] * 3, "none": [0.3] * 3}), "it", claim())
    assert (row.low, row.high) == (row.effect, row.effect)
    assert (row.verdict, math.isnan(row.p_for), math.isnan(row.p_against)) == ("supported", True, True)
    evidence = planted({"k": [0.9, 0.5, 0.1], ("k", 8 * LENGTH): [0.9, 0.5, 0.1]})
    row = verdict(evidence, baseline=None, baseline_multiple=8.0, test="non_inferior")
    assert (row["low"], row["high"], row["verdict"]) == (0, 0, "supported")
    assert math.isnan(row["p"])
    assert "held in all 3 runs (rate of exceptions up to 0.71)" in row["reason"]
    assert verdict_table(pd.DataFrame([row]))["p"].tolist() == ["held in all 3 runs"]
    assert verdict_table(pd.DataFrame([row | {"verdict": "contradicted"}]))["p"].tolist() == ["failed in all 3 runs"]


def test_different_sequences_are_tested_even_if_seeds_are_equal():
    (row,) = compare(planted({"k": [0.8] * 3, "none": [0.3] * 3}, noise=0.1), "it", claim())
    assert row.low < row.effect < row.high
    assert 0 <= row.p_for < 0.001


def test_p_of_a_claim_is_the_largest_for_it_and_bonferroni_against_it():
    row = Comparison("it", "ar", "accuracy", LENGTH, "k", "none", 0.5, 0.4, 0.6, seeds=3, verdict="supported")
    rows = [row._replace(p_for=0.001, p_against=0.3), row._replace(p_for=0.01, p_against=0.2)]
    against = [r._replace(p_for=0.9, p_against=p, verdict="contradicted") for r, p in zip(rows, (0.002, 0.2), strict=True)]
    # Two claims: p values for and against are corrected separately, so each is doubled.
    both = decide({"it": claim(), "not": claim()}, {"it": rows, "not": against})
    assert both["verdict"].tolist() == ["supported", "contradicted"]
    assert both["p"].tolist() == pytest.approx([0.01 * 2, 2 * 0.002 * 2])


def test_an_undecidable_claim_changes_no_other():
    row = Comparison("it", "ar", "accuracy", LENGTH, "k", "none", 0.5, 0.4, 0.6, seeds=3, verdict="supported", p_against=1.0)
    sure = [row._replace(p_for=0.004)]
    gap = [row._replace(p_for=1e-9), Comparison("it", "ar", "accuracy", LENGTH, "q", "none", reason="too few seeds: 1 of 3")]
    single = decide({"it": claim()}, {"it": sure})
    both = decide({"it": claim(), "gap": claim()}, {"it": sure, "gap": gap})
    assert single["p"][0] == both["p"][0]
    assert both["verdict"].tolist() == ["supported", "undecided"]


def test_an_insignificant_claim_shows_its_least_significant_comparison():
    row = Comparison("it", "ar", "accuracy", LENGTH, "k", "none", 0.5, 0.4, 0.6, seeds=3, verdict="supported", p_against=1.0)
    rows = [row._replace(effect=0.4, p_for=0.001), row._replace(variant="q", p_for=0.06), row._replace(effect=0.3)]
    table = decide({"it": claim()}, {"it": rows})
    assert table["verdict"].tolist() == ["undecided"]
    assert table["reason"][0] == f"not significant after correction for all claims: q against none on ar at length {LENGTH}"
    assert table["effect"][0] == 0.5


def test_p_values_are_corrected_for_many_claims():
    scores = {"k": [0.55, 0.60, 0.65], "none": [0.40, 0.36, 0.38]}
    tested = claim()
    rows = list(compare(planted(scores), "it", tested))
    assert rows[0].verdict == "supported"
    chance = list(compare(planted({"k": [0.1, 0.5, 0.3], "none": [0.3, 0.5, 0.1]}), "it", tested))
    table = decide({"it": tested, **dict.fromkeys("abcdefghi", tested)}, {"it": rows, **dict.fromkeys("abcdefghi", chance)})
    assert table["verdict"].tolist() == ["undecided"] * 10
    assert table["reason"][0].startswith("not significant after correction")


def test_variants_without_effect_decide_nothing():
    """Only claims that compare variants: a claim about a number is false for such scores, not undecided."""
    study = with_seeds(DEFAULT, 6)
    between = {name: made for name, made in CLAIMS.items() if isinstance(made.baseline, tuple)}
    verdicts = []
    for draw in range(8):
        evidence = Evidence(study, random_results(study, np.random.default_rng(draw)), {})
        verdicts += decide(between, {name: list(compare(evidence, name, made)) for name, made in between.items()})[
            "verdict"
        ].tolist()
    decided = sum(verdict != "undecided" for verdict in verdicts)
    assert decided <= 0.05 * len(verdicts), f"{decided} of {len(verdicts)} claims about random scores were decided"


# The file.


@pytest.fixture
def file(tmp_path):
    raw = YAML(typ="safe").load(ROOT / "presets" / "claims" / "text-cpu.yaml")

    def edited(**changes):
        path = tmp_path / "claims.yaml"
        for key, value in changes.items():
            raw["little_on_text"][key] = value
            if value is None:
                del raw["little_on_text"][key]
        with path.open("w") as handle:
            YAML().dump(raw, handle)
        return path

    return edited


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"statement": None}, "little_on_text.statement: is missing"),
        ({"statementz": "x"}, "little_on_text.statementz = \"x\": unknown key; did you mean 'statement'?"),
        ({"says": "x"}, 'little_on_text.says = "x": renamed to statement'),
        ({"test": "up"}, 'little_on_text.test = "up": '),
        ({"margin": -1}, "little_on_text.margin = -1: "),
        ({"min_seeds": 1}, "little_on_text.min_seeds = 1: "),
        ({"baseline": None}, "little_on_text: needs "),
        ({"registered": None}, "little_on_text.registered: is missing"),
        ({"registered": "soon"}, 'little_on_text.registered = "soon": '),
        ({"registered": FUTURE, "revised": []}, f"little_on_text: registered = {FUTURE} is in the future"),
        ({"registered": datetime.date(2026, 11, 28)}, "little_on_text: revised.date = 2026-11-27 is before 2026-11-28"),
        ({"test": "solved"}, "little_on_text: test = solved has no margin"),
        ({"test": "solved", "margin": None}, "little_on_text: test = solved has no baseline"),
        ({"margin": None}, "little_on_text: test = non_inferior needs a margin"),
        ({"share": 0.5}, "little_on_text: share is only for test = solved or unsolved, not for non_inferior"),
        ({"solved_at": 0.5}, "little_on_text: solved_at is only for test = solved, unsolved, solved_more, solved_less, not for"),
        ({"test": "solved_more", "margin": None, "baseline": 1.0}, "little_on_text: test = solved_more needs variants as"),
        ({"test": "solved", "margin": None, "baseline": None, "metric": "loss"}, "little_on_text: test = solved counts seeds by"),
        ({"baseline": ["qk_rotary"]}, "little_on_text: 'qk_rotary' is "),
        ({"baseline": None, "baseline_multiple": 1}, "little_on_text: baseline_multiple = 1 is "),
        ({"multiples": []}, "little_on_text.multiples = []: "),
        ({"variants": ["qk", "qk"]}, "little_on_text: variants "),
        ({"baseline": "none"}, 'little_on_text.baseline = "none": '),
    ],
)
def test_a_bad_claim_gives_one_line_with_its_name_and_key(file, changes, line):
    with pytest.raises(ParamsError) as error:
        claims.load(file(**changes))
    assert len(error.value.lines) == 1
    assert error.value.lines[0].split("claims.yaml: ")[1].startswith(line)


def test_invalid_yaml_gives_one_line(tmp_path):
    (tmp_path / "claims.yaml").write_text("a: [")
    with pytest.raises(ParamsError, match=r"claims\.yaml: "):
        claims.load(tmp_path / "claims.yaml")
    assert claims.load(tmp_path / "absent.yaml") == {}


def test_every_claim_of_the_repository_names_cells_of_its_study():
    """A misspelt name would always be undecided."""
    for name, made in CLAIMS.items():
        assert made.ablation in STUDY.ablations, name
        baselines = made.baseline if isinstance(made.baseline, tuple) else ()
        for task, variant in itertools.product(made.tasks, (*made.variants, *baselines)):
            assert variant in variants_on(STUDY, task), (name, task, variant)
        for task in made.tasks:
            assert {*made.multiples, *filter(None, [made.baseline_multiple])} <= set(STUDY.tasks[task].data.multiples), (
                name,
                task,
            )


def test_a_few_omitted_claims_are_listed_by_name():
    absent = "the study has no accuracy of kx on ar at 1x"
    verdicts = pd.DataFrame({"claim": [f"c{n}" for n in range(7)], "reason": [absent, "k against q", *[absent] * 5]})
    assert left_out(verdicts) == "6 of 7 claims need variants, tasks or lengths that this study does not have."
    assert left_out(verdicts[:3]) == "2 of 3 claims (c0, c2) need variants, tasks or lengths that this study does not have."
    assert left_out(verdicts[:2]) == "1 of 2 claims (c0) needs variants, tasks or lengths that this study does not have."
    assert left_out(verdicts[1:2]) == ""


# The stage.


def test_a_new_clone_computes_the_same_verdicts(study, tmp_path, monkeypatch):
    """Without data, runs, checkpoints and plan: only files that git tracks."""
    for name in ("params.yaml", "claims.yaml", "dvc.yaml"):
        shutil.copy(name, tmp_path)
    for name in ("results", "scores"):
        shutil.copytree(name, tmp_path / name)
    assert not {"/scores/", "/results/"} & set((ROOT / ".gitignore").read_text().splitlines())
    expected = {path.name: path.read_bytes() for path in Path("verdicts").iterdir()}
    monkeypatch.chdir(tmp_path)
    stage("judge")
    assert {path.name: path.read_bytes() for path in Path("verdicts").iterdir()} == expected


def test_the_stage_the_report_and_the_terminal_agree(study, capsys):
    verdicts = pd.read_csv("verdicts/claims.csv")
    assert verdicts["claim"].tolist() == list(claims.load())
    assert (verdicts["verdict"] == "undecided").all()  # two seeds, and most variants are not there
    solved = verdicts.set_index("claim").loc["cat_solves_recall"]
    assert solved["reason"].startswith(("too few seeds: 2 of 3", "the study has no accuracy of kv"))
    known = len(of_the_study(verdicts))
    results = read_results(load_study()).set_index(["task", "metric", "variant", "seed", "length"])["value"].sort_index()
    for metric, tolerance in (("accuracy", 1e-12), ("loss", 0.03)):
        sums = read_scores(Path("scores/ar.npz"))[metric]
        assert sums.keys() == {tuple(key) for key in results["ar", metric].index}
        for run, (total, weights) in sums.items():
            assert total.sum() / weights.sum() == pytest.approx(results["ar", metric][run], rel=tolerance), run
    for file in ("reports/report.md", "reports/headline.md"):
        text = Path(file).read_text(encoding="utf-8")
        counts = f"{known} claims: 0 supported, 0 contradicted, {known} undecided."
        assert f"{counts} {len(verdicts) - known} of {len(verdicts)} claims need " in text
    statements = {name: claim.statement for name, claim in claims.load().items()}
    report = Path("reports/report.md").read_text(encoding="utf-8")
    assert (statements["state_is_as_good"] in report, statements["cat_solves_recall"] in report) == (False, True)
    capsys.readouterr()
    stage("show", "ar")
    shown = capsys.readouterr().out
    assert "(ar): accuracy over 2 seeds" in shown
    assert "(copying): " not in shown
    assert "undecided" in shown


def test_the_terminal_shows_full_slugs_and_the_range_over_seeds(monkeypatch):
    monkeypatch.chdir(ROOT)
    results = random_results(STUDY, np.random.default_rng(0))
    at = (results["task"] == "nar") & (results["variant"] == "qk_network") & (results["multiple"] == 8)
    results.loc[at & (results["metric"] == "accuracy"), "value"] = [1.0, 0.34, 0.994]
    monkeypatch.setattr("pipeline.commands.show.read_results", lambda study: results)
    for task in STUDY.tasks:
        show(STUDY, task, Console(width=110, file=(shown := StringIO())))
        scores = shown.getvalue().partition("\nclaims")[0].splitlines()
        rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in scores if line.startswith("│")]
        names = [row[0] for row in rows]
        assert sorted(filter(None, names)) == sorted(variants_on(STUDY, task))
        if task == "nar":
            first = names.index("qk_network")
            column = 1 + STUDY.tasks[task].data.multiples.index(8)
            assert [row[column] for row in rows[first : first + 3]] == ["0.778", "0.340 to", "1.000"]


def test_the_terminal_counts_diverged_seeds(monkeypatch):
    monkeypatch.chdir(ROOT)
    results = random_results(STUDY, np.random.default_rng(0))
    for variant, values in {"qk": [1.0, math.nan, 0.5], "k": [math.nan] * 3}.items():
        at = (results["task"] == "nar") & (results["variant"] == variant) & (results["multiple"] == 8)
        results.loc[at & (results["metric"] == "accuracy"), "value"] = values
    monkeypatch.setattr("pipeline.commands.show.read_results", lambda study: results)
    show(STUDY, "nar", Console(width=200, file=(shown := StringIO())))
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.getvalue().splitlines() if line.startswith("│")]
    names, column = [row[0] for row in rows], 1 + STUDY.tasks["nar"].data.multiples.index(8)
    first = names.index("qk")
    assert [row[column] for row in rows[first : first + 3]] == ["0.750", "0.500 to 1.000", "1 diverged"]
    assert rows[names.index("k")][column] == "3 diverged"


def test_an_unknown_task_is_an_error(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as error:
        stage("show", "arr")
    assert error.value.code == 2


def test_a_missing_effect_is_a_dash():
    table = verdict_table(pd.DataFrame([verdict(planted({"k": HIGH}))]))
    assert table["effect (95 % interval)"].tolist() == ["-"]
