"""A cell that gets another seed or learning rate trains only the new runs, with the same bits as all runs at once."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest

import cat.training.fit
from pipeline.stages import train as training
from tests.helpers.study import edit, keep_ablation, stage, tiny_study
from tests.pipeline.runtime.test_checkpoints import digests

STEPS = 5
SEEDS, RATES = "defaults.training.seeds", "defaults.training.learning_rates"


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    """A study of one cell with its data."""
    folder = tmp_path_factory.mktemp("generated")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        tiny_study(folder, tasks=["copying"])
        keep_ablation("qkv_subsets", tasks=["copying"], variants=["k"])
        stage("generate", "copying")
    return folder


@pytest.fixture
def run_study(generated, tmp_path, monkeypatch):
    """Run the study in the working folder as DVC does, with these changes; return the runs that were trained."""
    shutil.copytree(generated, tmp_path / "study")
    monkeypatch.chdir(tmp_path / "study")
    fit, backward = training.fit, cat.training.fit.backward
    steps, runs = [], []

    def counted(*splits, learning_rate, seed, **options):
        before = len(steps)
        run = fit(*splits, learning_rate=learning_rate, seed=seed, **options)
        if len(steps) > before:
            assert len(steps) - before == STEPS
            runs.append((learning_rate, seeds[seed]))
        return run

    seeds = {training.derive_seed(seed, "copying", "batches"): seed for seed in range(10)}
    monkeypatch.setattr(training, "fit", counted)
    monkeypatch.setattr(cat.training.fit, "backward", lambda *a, **o: steps.append(None) or backward(*a, **o))

    def run_study(changes):
        runs.clear()
        edit(**changes)
        stage("plan")
        shutil.rmtree("runs", ignore_errors=True)  # as DVC does before a stage
        stage("train", "copying", "k")
        stage("evaluate", "copying")
        return set(runs)

    return run_study


def outcome():
    return digests(Path("runs")) | digests(Path("results"))


def summary():
    return json.loads(Path("runs/copying/k/summary.json").read_text())


def product(rates, seeds):
    return {(rate, seed) for rate in rates for seed in seeds}


@pytest.mark.parametrize(
    ("before", "after", "new"),
    [
        ({SEEDS: 2}, {SEEDS: 3}, product([0.005, 0.01], [2])),
        ({SEEDS: [4, 1]}, {SEEDS: [1, 7, 4]}, product([0.005, 0.01], [7])),
        ({RATES: [0.005]}, {RATES: [0.02, 0.005]}, product([0.02], [0, 1])),
        ({SEEDS: 1, RATES: [0.005]}, {SEEDS: 2, RATES: [0.005, 0.02]}, {(0.02, 0), (0.02, 1), (0.005, 1)}),
        ({SEEDS: 3}, {SEEDS: 2}, set()),
        ({RATES: [0.005, 0.01]}, {RATES: [0.01]}, set()),
        ({"defaults.training.grad_clip": 1.0}, {"defaults.training.grad_clip": 0.01}, product([0.005, 0.01], [0, 1])),
    ],
)
def test_only_new_runs_are_trained_and_all_bits_are_those_of_one_training(run_study, before, after, new):
    edit(**{RATES: [0.005, 0.01]})
    assert run_study(before)
    assert run_study(after) == new
    added = outcome()
    shutil.rmtree("checkpoints")
    assert len(run_study(after)) == len(summary()["runs"]) >= len(new)
    assert outcome() == added


def test_the_learning_rate_is_chosen_among_old_and_new_runs(run_study):
    run_study({RATES: [0.01]})
    assert run_study({RATES: [0.01, 1e-6]}) == product([1e-6], [0, 1])
    assert summary()["learning_rate"] == 0.01
    shutil.rmtree("checkpoints")
    run_study({RATES: [1e-6]})
    assert run_study({RATES: [1e-6, 0.01]}) == product([0.01], [0, 1])
    assert summary()["learning_rate"] == 0.01
    history = pd.read_csv("runs/copying/k/history.csv")
    assert set(zip(history["learning_rate"], history["seed"], strict=True)) == product([1e-6, 0.01], [0, 1])


def test_a_removed_run_that_returns_is_trained_again_after_an_evaluation(run_study):
    run_study({SEEDS: 2})
    run_study({SEEDS: 1})
    assert run_study({SEEDS: 2}) == {(0.005, 1)}
