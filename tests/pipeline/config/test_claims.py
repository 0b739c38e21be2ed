"""Claims about what there is not: an error where no study has it, a line of `validate` where this one does not."""

import shutil
from pathlib import Path

import pandas as pd
import pytest
from click.testing import CliRunner
from ruamel.yaml import YAML

from cat.evaluation.by_position import ByRecall
from pipeline.cli import main
from pipeline.config import claims
from pipeline.config.load import load_study
from tests.helpers.study import ROOT

RAW = YAML(typ="safe").load(ROOT / "claims.yaml")


@pytest.fixture
def study(tmp_path, monkeypatch):
    """The study's parameters and stages in the working folder."""
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(ROOT / name, tmp_path)
    monkeypatch.chdir(tmp_path)


def ask(command="validate", **changes):
    """What is said with some keys of claims changed, the grid aside."""
    raw = {name: {**about, **changes.get(name, {})} for name, about in RAW.items()}
    with Path("claims.yaml").open("w") as file:
        YAML().dump(raw, file)
    result = CliRunner().invoke(main, [command])
    return result.exit_code, result.stderr.splitlines()


@pytest.mark.parametrize("command", ["validate", "plan"])
@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            {"figure": "streems"},
            "figure = \"streems\": is not among ablations, and is not cost; did you mean 'streams'?",
        ),
        ({"figure": "zzz"}, 'figure = "zzz": is not among ablations, and is not cost'),
        ({"metric": "acuracy"}, "metric = \"acuracy\": no task has it; did you mean 'accuracy'?"),
        ({"metric": "attention_entropy"}, "metric = \"attention_entropy\": no task has it; did you mean 'attention_entropy_1'?"),
        (
            {"metric": "attention_entropy_0"},
            "metric = \"attention_entropy_0\": no task has it; did you mean 'attention_entropy_1'?",
        ),
    ],
)
def test_what_no_study_has_is_an_error(study, command, change, line):
    assert ask(command, keys_decide_recall=change) == (2, [f"claims.yaml: keys_decide_recall.{line}"])
    assert not Path("plan").exists()


def test_the_figure_of_a_claim_about_another_study_is_nothing_to_this_one(study):
    assert ask(keys_decide_recall={"figure": "zzz", "tasks": ["art"]}) == (
        0,
        ["claims.yaml: keys_decide_recall: no task art here; did you mean 'ar'?"],
    )


@pytest.mark.parametrize("change", [{}, {"figure": "cost"}, {"metric": "attention_on_answer_2"}])
def test_nothing_is_said_of_what_can_be_decided(study, change):
    assert ask(keys_decide_recall=change) == (0, [])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"variants": ["kx"]}, "no variant kx here; did you mean 'k'?"),
        ({"than": ["qkk"]}, "no variant qkk here; did you mean 'qk'?"),
        ({"tasks": ["nar", "copyng"]}, "no task copyng here; did you mean 'copying'?"),
        ({"variants": ["qk_l2"]}, "qk_l2 is not trained on ar here"),
        ({"multiples": [3]}, "no multiple 3 of ar here; there are 0.5, 1, 2, 4, 8, 16"),
        ({"than": None, "than_multiple": 32}, "no multiple 32 of ar here; there are 0.5, 1, 2, 4, 8, 16"),
        ({"metric": "bits_per_byte"}, "no bits_per_byte of ar"),
        ({"seeds": 9}, "3 of 9 seeds here"),
    ],
)
def test_what_this_study_does_not_have_is_told_of(study, change, reason):
    code, said = ask(keys_decide_recall=change)
    assert (code, said) == (0, [f"claims.yaml: keys_decide_recall: {reason}"])


def test_more_than_a_few_are_counted_and_named(study):
    names = list(RAW)[:6]
    wrong = {name: {"seeds": 9} for name in names}
    assert ask(**wrong) == (
        0,
        [f"claims.yaml: 6 of {len(RAW)} claims cannot be decided by this study: {', '.join(names)}"],
    )
    all_of_them = {name: {"seeds": 9} for name in RAW}
    assert ask(**all_of_them) == (0, [f"claims.yaml: none of its {len(RAW)} claims can be decided by this study"])
    del wrong[names[0]]
    assert ask(**wrong) == (0, [f"claims.yaml: {name}: 3 of 9 seeds here" for name in names[1:]])


def test_the_stage_says_nothing_of_what_is_undecided(study):
    assert ask("plan", keys_decide_recall={"variants": ["kx"]}) == (0, [])


@pytest.mark.parametrize("folder", [ROOT, *sorted((ROOT / "presets" / "results").glob("*-*"))], ids=lambda folder: folder.name)
def test_the_metrics_are_those_of_the_results(folder):
    """A metric that evaluation came to write could not be claimed of otherwise."""
    goals = {}
    for path in sorted((folder / "results").glob("*.csv")):
        found = set(pd.read_csv(path)["metric"])
        goal = "loss" if "bits_per_byte" in found else "accuracy"
        goals[goal] = goals.get(goal, set()) | {metric for metric in found if not claims.OF_A_LAYER.fullmatch(metric)}
    assert goals
    for goal, found in goals.items():
        assert found <= set(claims.METRICS[goal])
    assert ByRecall._fields == claims.RECALL


@pytest.mark.parametrize("file", ["params.yaml", *(f"presets/{path.name}" for path in (ROOT / "presets").glob("*.yaml"))])
def test_every_preset_has_the_figures_of_the_claims(file):
    claims.check(claims.load(ROOT / "claims.yaml"), load_study(ROOT / file))
