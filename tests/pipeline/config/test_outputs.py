"""Names of params.yaml that would overwrite what the stages write for something else."""

import itertools

import pytest

from pipeline.config.errors import ParamsError
from pipeline.config.load import study_of
from pipeline.config.outputs import figure_plots
from tests.pipeline.config.test_study import SMOKE, edited, errors_of

OFF = {"question": "?", "tasks": [], "variants": [], "plot": "heatmap"}
STUDY = study_of(SMOKE, "params.yaml")
FILES = [(file, name) for name, ablation in STUDY.ablations.items() for file in figure_plots(name, ablation)]
MADE = {file: name for file, name in FILES if file not in STUDY.ablations}


def test_the_figures_of_an_ablation():
    assert {"qkv_subsets_length", "qkv_subsets_training"} <= MADE.keys()


@pytest.mark.parametrize("file", MADE)
def test_an_ablation_with_the_name_of_a_figure_is_refused(file):
    (line,) = errors_of({f"ablations.{file}": OFF})
    problem = f"is also the name of a figure of ablation {MADE[file]!r}, which it would overwrite"
    assert line == f"ablations.{file}: {problem}. Fix: choose another name"


def test_the_order_of_two_ablations_makes_no_difference():
    first = {"ablations": {"depth_training": OFF, **SMOKE["ablations"]}}
    (line,) = errors_of(first)
    assert line.startswith("ablations.depth_training: is also the name of a figure of ablation 'depth'")


@pytest.mark.parametrize("name", ["claims", "cost", "cost_by_time"])
def test_an_ablation_with_the_name_of_another_section_is_refused(name):
    (line,) = errors_of({f"ablations.{name}": OFF})
    assert line.startswith(f"ablations.{name}: is also the name of the report's ")


@pytest.mark.parametrize("name", ["study", "stamp"])
def test_a_task_with_a_name_of_the_store_is_refused(name):
    task, lists = SMOKE["tasks"]["nar"], SMOKE["ablations"]["ngram"]["tasks"]
    lines = errors_of({f"tasks.{name}": task, "ablations.ngram.tasks": [*lists, name]})
    assert lines[0].startswith(f"tasks.{name}: is also the name of ")


def test_other_names_are_free():
    for name in ("training", "length", "report", "qkv_subsets_2", "study", "stamp"):
        study_of(edited({f"ablations.{name}": OFF}), "params.yaml")
    with pytest.raises(ParamsError, match="is in no ablation"):
        study_of(edited({"tasks.claims": SMOKE["tasks"]["nar"]}), "params.yaml")


def test_no_two_names_join_to_the_same_stage():
    """Stages join task and variant with signs that no name has."""
    names = ["a", "a_b", "b", "b_c", "c", "_".join("abc")]
    for text in ("train_{}@{}-{}", "{}/{}/{}"):
        assert len({text.format(*three) for three in itertools.product(names, repeat=3)}) == len(names) ** 3
