"""The recorded commit, and the changes that make the checkout dirty."""

import subprocess
from pathlib import Path

import pytest

from pipeline.storage.provenance import OUTPUTS, provenance


def git(*arguments):
    subprocess.run(["git", "-c", "user.name=x", "-c", "user.email=x@x", *arguments], check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("cat", "pipeline/stages", "reports"):
        Path(folder).mkdir(parents=True)
    for name in ("cat/model.py", "pipeline/stages/train.py", "params.yaml", "reports/lengths.csv", "dvc.lock"):
        Path(name).write_text("as committed\n")
    git("init")
    git("add", ".")
    git("commit", "-m", "x")


def test_files_that_stages_write_do_not_make_the_checkout_dirty(checkout):
    assert len(provenance()["commit"]) == 40
    for name in ("reports/lengths.csv", "dvc.lock"):
        Path(name).write_text("written by a stage\n")
    Path("new.txt").touch()
    assert provenance()["dirty"] is False


@pytest.mark.parametrize("name", ["cat/model.py", "params.yaml"])
def test_a_change_of_code_or_parameters_makes_the_checkout_dirty(checkout, monkeypatch, name):
    Path(name).write_text("changed\n")
    assert provenance()["dirty"] is True
    monkeypatch.chdir("pipeline")  # in a subfolder, too
    assert provenance()["dirty"] is True


def test_outside_git_the_commit_is_unknown(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert (provenance()["commit"], provenance()["dirty"]) == (None, None)


def test_outputs_in_git_are_those_without_dvc_cache():
    root = Path(__file__).parents[3]
    stages, ignored = (root.joinpath(name).read_text().splitlines() for name in ("dvc.yaml", ".gitignore"))
    in_git = {line.split("- ")[1].split(":")[0].split("/")[0] for line in stages if "cache: false" in line}
    assert in_git - {line.strip("/") for line in ignored} <= set(OUTPUTS)
