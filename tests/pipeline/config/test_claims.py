"""Claims that name something unknown: an error if no study can have it, a line of `validate` if only this study lacks it."""

import shutil
from pathlib import Path

import pandas as pd
import pytest
from click.testing import CliRunner
from ruamel.yaml import YAML

from cat.evaluation.by_recall import ByRecall
from pipeline.cli import main
from pipeline.config import claims
from pipeline.config.load import load_study
from tests.helpers.study import ROOT

RAW = YAML(typ="safe").load(ROOT / "claims.yaml")


@pytest.fixture
def study(tmp_path, monkeypatch):
    """params.yaml and dvc.yaml in the working directory."""
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(ROOT / name, tmp_path)
    monkeypatch.chdir(tmp_path)


def lines_of(command="validate", **changes):
    """The exit code and the error lines of a command after some keys of claims change."""
    raw = {name: {**claim, **changes.get(name, {})} for name, claim in RAW.items()}
    with Path("claims.yaml").open("w") as file:
        YAML().dump(raw, file)
    result = CliRunner().invoke(main, [command])
    return result.exit_code, result.stderr.splitlines()


@pytest.mark.parametrize("command", ["validate", "plan"])
@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            {"ablation": "qkv_subset"},
            "ablation = \"qkv_subset\": must be an ablation or cost; did you mean 'qkv_subsets'?",
        ),
        ({"ablation": "zzz"}, 'ablation = "zzz": must be an ablation or cost'),
        ({"metric": "acuracy"}, "metric = \"acuracy\": unknown metric; did you mean 'accuracy'?"),
        ({"metric": "attention_entropy"}, "metric = \"attention_entropy\": unknown metric; did you mean 'attention_entropy_1'?"),
        (
            {"metric": "attention_entropy_0"},
            "metric = \"attention_entropy_0\": unknown metric; did you mean 'attention_entropy_1'?",
        ),
    ],
)
def test_an_unknown_name_is_an_error(study, command, change, line):
    assert lines_of(command, keys_decide_recall=change) == (2, [f"claims.yaml: keys_decide_recall.{line}"])
    assert not Path("plan").exists()


def test_a_claim_about_another_study_may_name_its_ablation(study):
    assert lines_of(keys_decide_recall={"ablation": "zzz", "tasks": ["art"]}) == (
        0,
        ["claims.yaml: keys_decide_recall: this study has no task art; did you mean 'ar'?"],
    )


@pytest.mark.parametrize("change", [{}, {"ablation": "cost"}, {"metric": "attention_on_answer_2"}])
def test_decidable_claims_print_nothing(study, change):
    assert lines_of(keys_decide_recall=change) == (0, [])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"variants": ["kx"]}, "this study has no variant kx; did you mean 'k'?"),
        ({"baseline": ["qkk"]}, "this study has no variant qkk; did you mean 'qk'?"),
        ({"tasks": ["nar", "copyng"]}, "this study has no task copyng; did you mean 'copying'?"),
        ({"variants": ["qk_l2"]}, "this study does not train qk_l2 on ar"),
        ({"multiples": [3]}, "task ar has no multiple 3, only 0.5, 1, 2, 4, 8, 16, 32, 64, 128"),
        ({"baseline": None, "baseline_multiple": 5}, "task ar has no multiple 5, only 0.5, 1, 2, 4, 8, 16, 32, 64, 128"),
        ({"metric": "bits_per_byte"}, "task ar has no metric bits_per_byte"),
        ({"min_seeds": 9}, "this study has 6 seeds, fewer than min_seeds = 9"),
    ],
)
def test_what_this_study_lacks_is_reported(study, change, reason):
    assert lines_of(keys_decide_recall=change) == (0, [f"claims.yaml: keys_decide_recall: {reason}"])


def test_many_undecidable_claims_are_one_line(study):
    names = [name for name, claim in RAW.items() if claim["tasks"] == ["ar"]][:6]
    wrong = {name: {"min_seeds": 9} for name in names}
    assert lines_of(**wrong) == (
        0,
        [f"claims.yaml: this study cannot decide 6 of {len(RAW)} claims: {', '.join(names)}"],
    )
    all_wrong = {name: {"multiples": [3]} for name in RAW}
    assert lines_of(**all_wrong) == (0, [f"claims.yaml: this study can decide none of the {len(RAW)} claims"])
    del wrong[names[0]]
    assert lines_of(**wrong) == (
        0,
        [f"claims.yaml: {name}: this study has 6 seeds, fewer than min_seeds = 9" for name in names[1:]],
    )


def test_plan_does_not_print_undecidable_claims(study):
    assert lines_of("plan", keys_decide_recall={"variants": ["kx"]}) == (0, [])


@pytest.mark.parametrize("folder", [ROOT, *sorted((ROOT / "presets" / "results").glob("*-*"))], ids=lambda folder: folder.name)
def test_claims_may_use_every_metric_of_the_results(folder):
    goals = {}
    for path in sorted((folder / "results").glob("*.csv")):
        found = set(pd.read_csv(path)["metric"])
        goal = "loss" if "bits_per_byte" in found else "accuracy"
        goals[goal] = goals.get(goal, set()) | {metric for metric in found if not claims.LAYER_METRIC.fullmatch(metric)}
    assert goals
    for goal, found in goals.items():
        assert {metric for metric in found if not metric.startswith("accuracy_hops")} <= set(claims.METRICS[goal])
    assert ByRecall._fields == claims.RECALL


@pytest.mark.parametrize("file", ["params.yaml", *(f"presets/{path.name}" for path in (ROOT / "presets").glob("*.yaml"))])
def test_the_claims_fit_every_preset(file):
    claims.check(claims.load(ROOT / "claims.yaml"), load_study(ROOT / file))


@pytest.mark.parametrize("path", sorted((ROOT / "presets" / "claims").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_preset_can_decide_all_of_its_own_claims(path):
    study, own = load_study(ROOT / "presets" / path.name), claims.load(path)
    claims.check(own, study)
    assert own
    assert list(claims.undecided(own, study)) == []
