"""Every synthetic kind of task, from params.yaml to results, with the settings of its example."""

from itertools import product
from pathlib import Path

import pandas as pd
import pytest

from cat.tasks.registry import KINDS
from pipeline.stages.plan import note_lines
from tests.helpers.study import load_study, read_params, stage, tiny_study, write_params

SIZES = {"length": 40, "multiples": [1, 2], "train_examples": 64, "valid_examples": 16, "test_examples": 16}
FULL = {"ngram": 2, "keys": 5, "values": 9, "filler": 1, "pairs": 6, "queries": "all", "query_gap": "power"}
RECALL = {
    "orders": FULL | {"both_orders": True, "key_subset": True},
    "any": FULL | {"ngram": 1, "keys": 31, "filler": "any", "bos": False, "distinct_values": True, "pairs": 4},
    "fewer": FULL | {"keys": 3, "pairs": 6},
    "control": FULL | {"keys": 3, "pairs": 6, "padded": True},
}
DATA = {
    **{kind: {"kind": kind, **SIZES, **task.example} for kind, task in KINDS.items() if kind != "text"},
    **{name: {"kind": "recall", **SIZES, **settings} for name, settings in RECALL.items()},
}


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A planned study with one task per kind."""
    monkeypatch.chdir(tmp_path)
    tiny_study(tmp_path, tasks=["copying"])
    tasks = {name: {"data": data} for name, data in DATA.items()}
    ablation = {"question": "?", "tasks": [*tasks], "variants": ["k", "mamba"], "plot": "lines"}
    variants = {"k": {"conv_k": 3}, "mamba": {"mixer": "mamba"}}
    write_params(read_params() | {"tasks": tasks, "variants": variants, "ablations": {"kinds": ablation}})
    Path("dvc.yaml").unlink()
    stage("plan")
    return load_study()


@pytest.mark.parametrize("name", DATA)
def test_a_task_is_generated_trained_and_evaluated(study, name):
    stage("generate", name)
    for variant in study.variants:
        stage("train", name, variant)
    stage("evaluate", name)
    accuracy = pd.read_csv(f"results/{name}.csv").query("metric == 'accuracy'")
    assert set(zip(accuracy["variant"], accuracy["length"], strict=True)) == set(product(study.variants, [40, 80]))
    assert accuracy["value"].between(0, 1).all()
    references = pd.read_csv(f"results/references/{name}.csv")
    assert list(dict.fromkeys(references["reference"])) == list(study.tasks[name].data.reference_names)
    assert references["value"].between(0, 1, inclusive="right").all()


def test_only_a_test_with_filler_for_pairs_that_is_no_control_has_a_note(study):
    (line,) = (line for line in note_lines(study) if "tasks.recall." not in line)
    assert line == (
        "tasks.fewer.data: tests of 80 tokens and more have only 9 pairs, as many as there are keys; 31% of 80 tokens is filler."
        " Fix: keys = 4 with key_subset: true, or padded: true for a control"
    )
