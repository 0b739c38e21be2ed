"""README.md and the pages of docs/ are true: commands, paths and links exist, and numbers are those of the committed study."""

import re
import shutil
import subprocess
import sys

import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from pydantic import TypeAdapter
from ruamel.yaml import YAML

from pipeline.cli import main
from pipeline.config.claims import Claim
from pipeline.config.study import Ablation
from pipeline.stages.render import README_MARKS
from tests.helpers.study import ROOT

PAGES = {
    path: (ROOT / path).read_text(encoding="utf-8")
    for path in (
        "README.md", "docs/guide.md", "docs/layer.md", "docs/reproducibility.md", "docs/statistics.md",
        "docs/performance.md", "docs/style.md", "docs/cluster.md", "presets/results/README.md",
    )
}  # fmt: skip
README, GUIDE = PAGES["README.md"], PAGES["docs/guide.md"]
ROOMS = "benchmarks|cat|docs|examples|pipeline|presets|tests"


def committed(path):
    """Return a file of the last commit, or None outside of a git checkout."""
    done = subprocess.run(["git", "show", f"HEAD:{path}"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout if done.returncode == 0 else None


def code_blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page, flags=re.DOTALL)


# The numbers.


def test_summary_is_that_of_the_committed_study():
    headline, readme = committed("reports/headline.md"), committed("README.md")
    if headline is None:
        pytest.skip("not a git checkout, so there is no committed study to compare with")
    first, last = README_MARKS
    summary = readme.partition(first)[2].partition(last)[0].strip()
    assert summary == headline.replace("](report.md#", "](reports/report.md#").strip()


@pytest.mark.parametrize(
    ("bullet", "cells"),
    [
        (
            "Recall needs convolved keys",
            [("ar", variant, multiple) for variant in ("k", "none") for multiple in (1, 8, 32)] + [("ar", "k", 128)],
        ),
        (
            "Two-token keys also need convolved queries",
            [("nar", variant, multiple) for variant in ("qk", "k") for multiple in (1, 32)],
        ),
        (
            "Other mixers learn recall",
            [("ar_deep", variant, multiple) for variant in ("rotary_l2", "based", "gla_short", "mamba") for multiple in (1, 8)],
        ),
        ("Facts in real text", [("needles", variant, multiple) for variant in ("qk", "k", "qk_rotary") for multiple in (1, 16)]),
        (
            "Short convolutions copy poorly",
            [("copying", variant, multiple) for variant in ("qkv", "qk_state") for multiple in (1, 8)],
        ),
        ("Others are as good", [("nar", "canon_a", 32), ("nar", "multi_token", 32)]),
    ],
)
def test_numbers_of_each_result_are_those_of_the_results(bullet, cells):
    (text,) = re.findall(rf"^\* \*\*{bullet}(.*?)\[Details\]", README, flags=re.MULTILINE | re.DOTALL)
    shown = [float(number) for number in re.findall(r"\b\d\.\d\d\b", text)]
    assert shown == pytest.approx([mean(*cell) for cell in cells], abs=0.0051)


def mean(task, variant, multiple):
    """Return the mean accuracy over seeds of a variant in the results of this folder."""
    table = pd.read_csv(ROOT / "results" / f"{task}.csv")
    length = YAML(typ="safe").load(ROOT / "params.yaml")["tasks"][task]["data"]["length"] * multiple
    found = table[(table["variant"] == variant) & (table["metric"] == "accuracy") & (table["length"] == length)]["value"]
    assert len(found)
    return found.mean()


# The examples.


def test_study_that_the_readme_declares_is_valid():
    (text,) = code_blocks(README, "yaml")
    declared = YAML(typ="safe").load(text)
    defaults, tasks, variants, ablations = (declared.pop(key) for key in ("defaults", "tasks", "variants", "ablations"))
    for kind, entries in ((Ablation, ablations), (Claim, declared)):
        assert entries
        for entry in entries.values():
            TypeAdapter(kind).validate_python(entry)
    study = YAML(typ="safe").load(ROOT / "params.yaml")
    for shown, section in ((defaults.pop("training"), study["defaults"].pop("training")), (defaults, study["defaults"])):
        assert shown.items() <= section.items()
    for shown, section in ((tasks, study["tasks"]), (variants, study["variants"])):
        assert shown.items() <= section.items()


def test_layer_example_of_the_readme_runs():
    (snippet,) = code_blocks(README, "python")
    names = {}
    exec(snippet, names)
    assert names["y"].shape == names["x"].shape
    torch.testing.assert_close(names["out"], names["y"][:, -1:])


def test_each_test_that_the_table_of_the_layer_names_exists():
    named = re.findall(r'\[(?:yes|not run yet)\]\(\.\./(\S+) "(\w+)"\)', PAGES["docs/layer.md"])
    assert len(named) > 20
    for path, name in named:
        assert f"\ndef {name}(" in (ROOT / path).read_text(encoding="utf-8"), name


def test_mistakes_that_the_guide_shows_are_answered_like_that(tmp_path):
    (shown,) = re.findall(r"\$ python -m pipeline validate\n((?:params\.yaml: .*\n)+)", GUIDE)
    raw = YAML(typ="safe").load(ROOT / "params.yaml")
    for path, value in re.findall(r'params\.yaml: (\S+) = "(\w+)": ', shown):
        section, name, key = path.split(".")
        raw[section][name][key] = value
    with (tmp_path / "params.yaml").open("w") as file:
        YAML().dump(raw, file)
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    command = [sys.executable, "-m", "pipeline", "validate"]
    done = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", shown)


# Commands, paths and links.


def test_every_make_target_exists():
    targets = sorted({target for page in PAGES.values() for target in re.findall(r"(?:`|^)make (\w+)", page, flags=re.MULTILINE)})
    assert len(targets) >= 5
    done = subprocess.run(["make", "--dry-run", *targets], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_command_and_option_exists():
    lines = {line for page in PAGES.values() for line in re.findall(r"-m pipeline ([a-z][^`\n#]*)", page)}
    assert len(lines) >= 12
    for line in lines:
        name, *rest = line.split()
        assert name in main.commands, line
        known = {option for parameter in main.commands[name].params for option in parameter.opts}
        assert {word.partition("=")[0] for word in rest if word.startswith("--")} <= known | {"--help"}, line
    assert CliRunner().invoke(main, ["--help"]).exit_code == 0


@pytest.mark.parametrize("page", PAGES)
def test_every_path_exists(page):
    text, folder = PAGES[page], (ROOT / page).parent
    linked = {path for path in re.findall(r"\]\(([^)#:\s]+)[)#]", text) if not (folder / path).exists()}
    named = {path for path in re.findall(rf"`((?:{ROOMS})/[\w/.-]+)`", text) if not (ROOT / path).exists()}
    assert linked | named <= {"docs/api/index.html"}  # made by `make docs`


@pytest.mark.parametrize("page", PAGES)
def test_every_link_to_a_section_exists(page):
    report = {"claims", "cost", *YAML(typ="safe").load(ROOT / "params.yaml")["ablations"]}
    for path, anchor in re.findall(r"\]\(([^)#:\s]*)#([\w-]+)\)", PAGES[page]):
        target = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        if target == ROOT / "reports" / "report.md":
            assert anchor in report, (path, anchor)
        else:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}, (path, anchor)


def test_plots_of_dvc_are_ignored_by_git():
    done = subprocess.run(["git", "check-ignore", "dvc_plots/index.html"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 128:
        pytest.skip("not a git checkout, and only git reads .gitignore")
    assert done.stdout == "dvc_plots/index.html\n"
