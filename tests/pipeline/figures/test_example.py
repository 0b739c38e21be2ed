"""A study of needles in text runs through every stage that trains, and its example is readable."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest

from pipeline.config.load import load_study
from pipeline.config.study import Ablation
from pipeline.figures.drawing.example_sequence import read_example
from pipeline.stages import train
from pipeline.storage.files import read_json
from pipeline.storage.results import primary, read_references, read_results
from pipeline.storage.task_data import read_split, read_task
from tests.helpers.figures import draw
from tests.helpers.study import edit, keep_ablation, stage, tiny_study

ROWS = "Cost $5 or $6, said the owner of the old shop; {} of them were sold to the man in the grey hat.\n"
DATA = {
    "kind": "needles",
    "source": "rows.txt",
    "needles": 3,
    "queries": 2,
    "ngram": 2,
    "values": 12,
    "length": 64,
    "multiples": [1, 2],
    "train_examples": 64,
    "valid_examples": 8,
    "test_examples": 16,
}


@pytest.fixture(params=[{}, {"tokens": "bpe", "vocabulary_size": 300}], ids=["bytes", "bpe"])
def study(request, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "_splits", train._splits.__wrapped__)  # its cache is by task name, not by folder
    (source := tmp_path / "rows.txt").write_text("".join(map(ROWS.format, range(400))))
    tiny_study(tmp_path, tasks=["copying"])
    edit(**{"tasks": {"needles": {"data": DATA | request.param | {"source": str(source)}}}})
    keep_ablation("qkv_subsets", tasks=["needles"], variants=["none", "qk"])
    edit(
        **{
            "ablations.example": {
                "question": "?",
                "reference_tasks": ["needles"],
                "reference_variants": ["qk"],
                "plot": "example",
            }
        }
    )
    stage("plan")
    stage("generate", "needles")
    for variant in ("none", "qk"):
        stage("train", "needles", variant)
    stage("evaluate", "needles")
    return load_study()


def test_a_study_of_needles_trains_and_its_example_is_readable(study):
    scores = primary(study, read_results(study))
    assert {(row.variant, row.length) for row in scores.itertuples()} == {(v, n) for v in ("none", "qk") for n in (64, 128)}
    references = read_references(study)
    assert list(references["reference"].unique()) == ["guess_value", "last_value", "any_occurrence", "last_key_token"]
    task, examples = read_task("needles"), read_split("needles", "test_64")
    np.testing.assert_array_equal(task.oracle(examples), examples.targets)

    ablation = Ablation(question="?", tasks=["needles"], variants=["qk"], plot="example")
    figure = draw("example", study, ablation, read_results(study))
    axes, example = figure.axes[0], read_example("needles")
    needles = [label.get_text() for label in axes.get_xticklabels()]
    queries = [label.get_text() for label in axes.get_yticklabels()]
    assert [needle.partition(" → ")[0] for needle in needles] == queries
    assert [int(tick) for tick in axes.get_xticks()] == example.answer_positions.tolist()
    frames = [tuple(map(int, frame.get_xy())) for frame in axes.patches]
    assert frames == list(zip(example.answer_positions, range(2), strict=True))
    assert not any(letter in label for label in needles for letter in "\n�")
    figure.savefig("example.svg")
    plt.close(figure)


def test_test_settings_train_nothing_again(study, tmp_path):
    before = read_json(Path("data/needles/meta.json"))
    (other := tmp_path / "other.txt").write_text("".join(map(ROWS.format, range(400, 800))))
    edit(**{"tasks.needles.data.test_depth": 10, "tasks.needles.data.test_source": str(other)})
    stage("generate", "needles")
    after = read_json(Path("data/needles/meta.json"))
    assert after["config"] == before["config"]
    assert after["splits"] == before["splits"]
    assert read_task("needles").test_depth == 10
