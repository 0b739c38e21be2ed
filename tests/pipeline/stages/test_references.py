"""The table of partial strategies, and a task of another package: the example of docs/guide.md."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest

from pipeline.config.errors import ParamsError
from pipeline.config.load import load_study
from pipeline.stages.evaluate import references
from pipeline.stages.plan import check_stages
from pipeline.storage.results import read_references
from pipeline.storage.task_data import read_split, read_task
from tests.helpers.study import ROOT, edit, stage, tiny_study


def test_the_table_has_each_strategy_at_each_length(study):
    table = read_references(study)
    assert list(table) == ["task", "reference", "length", "multiple", "metric", "value"]
    for task, section in study.tasks.items():
        rows = table[table["task"] == task]
        assert list(dict.fromkeys(rows["reference"])) == list(section.data.reference_names)
        assert len(rows) == len(section.data.reference_names) * len(section.data.lengths)
        np.testing.assert_allclose(rows["multiple"] * section.data.length, rows["length"], atol=0.5)
    metrics = table.groupby("task")["metric"].unique().map(list).to_dict()
    assert metrics == {"ar": ["accuracy"], "copying": ["accuracy"], "text": ["bits_per_byte"]}
    uncopied = table.query("task == 'copying' and reference == 'any_uncopied'")["value"]
    signals = study.tasks["copying"].data.signals
    np.testing.assert_allclose(uncopied, np.mean([1 / left for left in range(1, signals + 1)]))


def test_a_missing_row_of_the_table_is_an_error(study):
    path = Path("results/references/copying.csv")
    path.write_text("".join(line for line in path.read_text().splitlines(keepends=True) if ",any_uncopied,32," not in line))
    with pytest.raises(ValueError, match=f"{path}: lacks any_uncopied at length 32; run `dvc repro`"):
        read_references(study)


@pytest.fixture
def own_study(tmp_path, monkeypatch):
    """A study with the task of the guide: its module, its block of params.yaml, and the dependency of `plan`."""
    guide = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
    (source,) = re.findall(r'```python\n("""First token.*?)```', guide, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    tiny_study(tmp_path, tasks=["copying"])
    Path("my_tasks").mkdir()
    Path("my_tasks/first.py").write_text(source)
    data = {"kind": "my_tasks.first", "alphabet": 16, "length": 32, "multiples": [1, 2]}
    data |= {"train_examples": 128, "valid_examples": 8, "test_examples": 64}
    edit(**{"tasks.first": {"data": data}, "ablations.qkv_subsets.tasks": ["copying", "first"]})
    text = Path("dvc.yaml").read_text()
    assert "deps: [params.yaml, claims.yaml, cat, pipeline]" in text
    Path("dvc.yaml").write_text(text.replace("claims.yaml, cat, pipeline]", "claims.yaml, cat, pipeline, my_tasks]"))
    yield load_study()
    for name in ("my_tasks", "my_tasks.first"):
        sys.modules.pop(name, None)


def test_a_task_of_another_package_is_planned_generated_and_scored(own_study):
    stage("plan")
    before = Path("plan/generate/first.txt").read_text()
    stage("generate", "first")
    task = read_task("first")
    assert type(task).__module__ == "my_tasks.first"
    examples = read_split("first", "test_64")
    np.testing.assert_array_equal(task.oracle(examples), examples.targets)
    rows = references("first", task)
    assert [(row["reference"], row["length"], row["multiple"]) for row in rows] == [("any_token", 32, 1), ("any_token", 64, 2)]
    np.testing.assert_allclose([row["value"] for row in rows], [1 / 32 + 31 / 32 / 16, 1 / 64 + 63 / 64 / 16], atol=0.02)

    from pipeline.config.code_digest import module_digest

    path = Path("my_tasks/first.py")
    path.write_text(path.read_text().replace("[:, 0]", "[:, 1]"))
    module_digest.cache_clear()
    stage("plan")
    assert Path("plan/generate/first.txt").read_text() != before


def test_plan_must_depend_on_the_package_of_an_own_task(own_study):
    check_stages(own_study)
    path = Path("dvc.yaml")
    path.write_text(path.read_text().replace(", my_tasks]", "]"))
    with pytest.raises(ParamsError, match=r"tasks.first: .* must depend on my_tasks/first.py. Fix: add my_tasks to its deps"):
        check_stages(own_study)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("alphabet", 0, "tasks.first.data.alphabet = 0: must be greater than or equal to 1"),
        ("alphabt", 3, "tasks.first.data.alphabt = 3: unknown key; did you mean 'alphabet'?"),
        ("train", 3, "tasks.first.data.train = 3: renamed to train_examples"),
        ("kind", "my_tasks.second", "tasks.first.data: kind = my_tasks.second: cannot be imported (ModuleNotFoundError"),
    ],
)
def test_mistakes_in_an_own_task_are_errors_of_params_yaml(key, value, message, own_study):
    edit(**{f"tasks.first.data.{key}": value})
    with pytest.raises(ParamsError) as error:
        load_study()
    assert f"params.yaml: {message}" in str(error.value)
