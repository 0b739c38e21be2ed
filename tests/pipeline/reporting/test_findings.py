"""What an ablation found, in one line per task."""

import pandas as pd

from pipeline.config.grid import shown_on
from pipeline.config.load import load_study
from pipeline.reporting.findings import findings
from pipeline.reporting.labels import variant_label
from tests.helpers.study import ROOT


def scores(task, **by_variant):
    """Rows of scores: variant -> multiple -> values, one per seed."""
    rows = [
        (task, variant, multiple, seed, value)
        for variant, by_multiple in by_variant.items()
        for multiple, values in by_multiple.items()
        for seed, value in enumerate(values)
    ]
    return pd.DataFrame(rows, columns=["task", "variant", "multiple", "seed", "value"])


def test_seeds_that_solve_the_task_are_counted_at_each_length():
    study = load_study(ROOT / "presets" / "tutorial.yaml")
    table = scores(
        "ar",
        none={1: [0.1, 0.3], 4: [1.0, 1.0], 8: [0.0, 0.1]},  # 4x is no length of the tables
        k={1: [1.0, 0.99], 8: [1.0, 1.0]},
        linear={1: [1.0, 1.0], 8: [0.9, 0.5]},
        lincat={1: [1.0, 0.98], 8: [0.4, 0.5]},
    )
    assert findings(study, table, study.ablations["baselines"]) == (
        "* associative recall. Solved at 1x and 8x with every seed: CAT-K. Solved at 1x only with every seed: Linear attention."
        " Solved with some seeds: LinCAT-K (1 of 2 at 1x and 0 of 2 at 8x)."
        " Not solved: Transformer (no convolution), 0.20 at 1x and 0.05 at 8x."
    )


def test_the_best_of_the_variants_that_fail_is_named():
    study = load_study(ROOT / "presets" / "tutorial.yaml")
    table = scores("ar", none={1: [0.1], 8: [0.2]}, k={1: [0.5], 8: [0.1]})
    found = findings(study, table, study.ablations["qkv_subsets"])
    assert found == "* associative recall. Best of 2: CAT-K, 0.50 at 1x and 0.10 at 8x."


def test_text_has_a_lowest_and_a_highest_number_of_bits():
    study = load_study(ROOT / "presets" / "smoke.yaml")
    ablation = next(ablation for ablation in study.ablations.values() if "text" in ablation.reference_tasks)
    first, second, *_ = shown_on(study, ablation, "text")
    found = findings(study, scores("text", **{first: {1: [3.0, 2.0]}, second: {1: [2.4, 2.2]}}), ablation)
    names = [variant_label(study, variant) for variant in (second, first)]
    assert found == f"* text. Fewest bits per byte at 1x: {names[0]}, 2.30. Most: {names[1]}, 2.50."


def test_constructions_are_not_trained_and_left_out():
    study = load_study(ROOT / "params.yaml")
    ablation = study.ablations["construction"]
    table = scores("ar", construction={1: [1.0]}, k={1: [0.5]})
    found = findings(study, table, ablation)
    assert found.endswith("Not solved: CAT-K, 0.50 at 1x.")
    assert "Construction" not in found
