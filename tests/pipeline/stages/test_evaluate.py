"""Evaluation scores each model once, and again only if something that its scores depend on has changed."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import safetensors.torch
from safetensors import safe_open

from pipeline.stages import evaluate
from pipeline.storage import runs
from tests.helpers.study import edit, stage

STORE = Path("checkpoints/copying/scores")


@pytest.fixture
def scored(monkeypatch):
    """The runs that are scored: (variant, seed)."""
    jobs, function = [], evaluate._evaluate_model

    def counted(task, data, precision, job, *others):
        jobs.append((job.variant, job.seed))
        return function(task, data, precision, job, *others)

    monkeypatch.setattr(evaluate, "_evaluate_model", counted)
    return jobs


def outputs(task):
    paths = [Path("results", folder, f"{task}.csv") for folder in (".", "filters", "references", "rates")]
    return [path.read_bytes() for path in (*paths, Path("scores", f"{task}.npz"))]


def change_weights(path):
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    weights = {name: 0.5 * tensor for name, tensor in safetensors.torch.load_file(path).items()}
    safetensors.torch.save_file(weights, path, metadata)


def test_seeds_with_equal_weights_are_scored_once(study, scored):
    stage("evaluate", "copying")
    assert scored.count(("construction", 0)) == 1
    assert ("construction", 1) not in scored
    assert {("qk", 0), ("qk", 1)} < set(scored)
    table = pd.read_csv("results/copying.csv").set_index(["variant", "seed"])
    first, second = (table.loc["construction", seed].reset_index(drop=True) for seed in (0, 1))
    pd.testing.assert_frame_equal(first, second)
    assert len(first) >= 4


@pytest.mark.parametrize("task", ["copying", "text"])
def test_kept_scores_give_the_same_files(study, scored, task):
    before = outputs(task)
    stage("evaluate", task)
    assert outputs(task) == before
    assert scored
    scored.clear()
    shutil.rmtree("results")
    shutil.rmtree("scores")
    stage("evaluate", task)
    assert outputs(task) == before
    assert scored == []


def test_one_changed_variant_is_scored_alone(study, scored):
    stage("evaluate", "copying")
    scored.clear()
    kept = {path.name for path in STORE.iterdir()}
    change_weights(runs.weights_path("copying", "k", 0))
    change_weights(runs.weights_path("copying", "k", 1))
    stage("evaluate", "copying")
    assert sorted(scored) == [("k", 0), ("k", 1)]
    now = {path.name for path in STORE.iterdir()}
    assert (len(now - kept), len(kept - now)) == (2, 2)
    after = outputs("copying")
    shutil.rmtree(STORE)
    stage("evaluate", "copying")
    assert outputs("copying") == after


def other_tests(monkeypatch):
    edit(**{"tasks.copying.data.test_examples": 31})
    stage("generate", "copying")


def other_code(*modules):
    def change(monkeypatch):
        digest = evaluate.code_digest
        monkeypatch.setattr(evaluate, "code_digest", lambda used: digest(used) + "".join({*modules} & {*used}))

    return change


def damaged(monkeypatch):
    for path in STORE.iterdir():
        path.write_text(path.read_text().replace("accuracy", "Accuracy", 1))


def renamed(monkeypatch):
    first, second, *_ = sorted(STORE.iterdir())
    first.replace(second)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (other_tests, "all"),
        (lambda monkeypatch: edit(precision="bfloat16"), "all"),
        (other_code("pipeline.stages.evaluate"), "all"),
        (other_code("cat.tasks.copying"), "all"),
        (other_code("cat.mixers.attention.layer"), "all"),
        (other_code("cat.mixers.mamba.layer"), "none"),  # no variant on the task has it
        (lambda monkeypatch: monkeypatch.setattr(evaluate, "made_on", lambda device: "another CPU"), "all"),
        (damaged, "all"),
        (renamed, 2),
    ],
    ids=[
        "tests",
        "precision",
        "code",
        "code of the task",
        "code of its mixer",
        "code of another mixer",
        "device",
        "damaged",
        "renamed",
    ],
)
def test_a_change_is_noticed(study, scored, monkeypatch, change, expected):
    stage("evaluate", "copying")
    every = len(scored)
    scored.clear()
    change(monkeypatch)
    stage("evaluate", "copying")
    assert len(scored) == {"all": every, "none": 0}.get(expected, expected)


def test_a_seed_that_diverged_is_not_taken_for_its_earlier_weights(study):
    stage("evaluate", "copying")
    path = runs.folder("copying", "k") / "summary.json"
    summary = json.loads(path.read_text())
    for run in summary["runs"]:
        run["stop"] = "diverged" if run["seed"] == 1 else run["stop"]
    path.write_text(json.dumps(summary))
    stage("evaluate", "copying")
    values = pd.read_csv("results/copying.csv").query("variant == 'k'").set_index("seed")["value"]
    assert values[1].isna().all()
    assert values[0].notna().all()
