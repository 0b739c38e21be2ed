"""Which commit a result is by, and what makes it another."""

import subprocess
from pathlib import Path

import pytest

from pipeline.storage.provenance import OUTPUTS, provenance


def git(*arguments):
    subprocess.run(["git", "-c", "user.name=x", "-c", "user.email=x@x", *arguments], check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("cat", "pipeline", "reports"):
        Path(folder).mkdir()
    for name in ("cat/model.py", "pipeline/stages/train.py", "params.yaml", "reports/lengths.csv", "dvc.lock"):
        Path(name).write_text("as committed\n")
    git("init")
    git("add", ".")
    git("commit", "-m", "x")


def test_what_the_study_writes_makes_no_commit_another(checkout):
    assert len(provenance()["commit"]) == 40
    for name in ("reports/lengths.csv", "dvc.lock"):
        Path(name).write_text("written by a stage\n")
    Path("new.txt").touch()
    assert provenance()["dirty"] is False


@pytest.mark.parametrize("name", ["cat/model.py", "params.yaml"])
def test_a_change_of_code_or_parameters_does(checkout, monkeypatch, name):
    Path(name).write_text("changed\n")
    assert provenance()["dirty"] is True
    monkeypatch.chdir("pipeline")  # from wherever it is asked
    assert provenance()["dirty"] is True


def test_outside_git_nothing_is_known(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert (provenance()["commit"], provenance()["dirty"]) == (None, None)


def test_the_outputs_are_what_dvc_yaml_says_that_git_has():
    root = Path(__file__).parents[3]
    stages, ignored = (root.joinpath(name).read_text().splitlines() for name in ("dvc.yaml", ".gitignore"))
    kept = {line.split("- ")[1].split(":")[0].split("/")[0] for line in stages if "cache: false" in line}
    assert kept - {line.strip("/") for line in ignored} <= set(OUTPUTS)
