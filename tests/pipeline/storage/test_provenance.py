"""The recorded commit, and the changes that make the checkout dirty."""

import os
import shutil
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


@pytest.fixture
def part_of_repository(checkout, monkeypatch):
    """The project as a folder of a larger repository."""
    shutil.rmtree(".git")
    Path("project").mkdir()
    for path in [path for path in Path().iterdir() if path.name != "project"]:
        path.rename(Path("project", path.name))
    Path("other.py").write_text("as committed\n")
    git("init")
    git("add", ".")
    git("commit", "-m", "x")
    monkeypatch.chdir("project")


def test_in_a_larger_repository_only_the_project_counts(part_of_repository):
    for name in ("reports/lengths.csv", "dvc.lock", "../other.py"):
        Path(name).write_text("changed\n")
    assert (len(provenance()["commit"]), provenance()["dirty"]) == (40, False)
    Path("cat/model.py").write_text("changed\n")
    assert provenance()["dirty"] is True


def test_a_copy_that_is_not_in_the_repository_around_it_has_no_commit(part_of_repository, monkeypatch):
    Path("../copy").mkdir()
    Path("../copy/params.yaml").touch()
    monkeypatch.chdir("../copy")
    assert (provenance()["commit"], provenance()["dirty"]) == (None, None)


def test_without_the_git_program_the_commit_is_unknown(checkout, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert (provenance()["commit"], provenance()["dirty"]) == (None, None)


def test_a_repository_that_git_refuses_is_named_with_the_remedy(checkout, monkeypatch, capsys):
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    found = provenance()
    assert (found["commit"], found["dirty"]) == (None, None)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{Path.cwd()}: belongs to another user")
    assert line.endswith(f"Fix: `git config --global --add safe.directory {Path.cwd()}`")


def test_a_folder_that_may_not_be_entered_is_no_project(tmp_path, monkeypatch):
    stat = os.stat

    def refuse(path, **options):
        if Path(path).name == "params.yaml":
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, **options)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "stat", refuse)
    assert provenance()["commit"] is None


def test_outputs_in_git_are_those_without_dvc_cache():
    root = Path(__file__).parents[3]
    stages, ignored = (root.joinpath(name).read_text().splitlines() for name in ("dvc.yaml", ".gitignore"))
    in_git = {line.split("- ")[1].split(":")[0].split("/")[0] for line in stages if "cache: false" in line}
    assert in_git - {line.strip("/") for line in ignored} <= set(OUTPUTS)
