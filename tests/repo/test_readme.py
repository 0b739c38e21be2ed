"""README.md says what is true: its commands exist, its paths are there, its numbers are those of the committed study."""

import re
import shutil
import subprocess
import sys

import pytest
from ruamel.yaml import YAML

from pipeline.stages.render import README_MARKS
from tests.helpers.study import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def committed(path):
    """A file as the last commit has it, or None where this is no checkout of git."""
    done = subprocess.run(["git", "show", f"HEAD:{path}"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout if done.returncode == 0 else None


def test_the_headline_is_that_of_the_committed_study():
    headline, readme = committed("reports/headline.md"), committed("README.md")
    if headline is None:
        pytest.skip("not a checkout of git, so there is no committed study to compare with")
    first, last = README_MARKS
    assert (
        readme.partition(first)[2].partition(last)[0].strip() == headline.replace("](report.md#", "](reports/report.md#").strip()
    )


def test_what_dvc_draws_in_the_working_folder_is_not_for_git():
    done = subprocess.run(["git", "check-ignore", "dvc_plots/index.html"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 128:
        pytest.skip("not a checkout of git, which alone reads .gitignore")
    assert done.stdout == "dvc_plots/index.html\n"


def test_every_path_of_the_readme_exists():
    paths = {*re.findall(r"\]\(([^)#:]+)\)", README), *re.findall(r"`((?:cat|tests|presets|pipeline)/[\w/.]+)`", README)}
    assert len(paths) >= 6
    assert {path for path in paths if not (ROOT / path).exists()} == set()


@pytest.mark.parametrize("target", sorted(set(re.findall(r"make (\w+)", README)) - {"it"}))
def test_every_make_target_of_the_readme_exists(target):
    done = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", sorted(set(re.findall(r"python -m pipeline ([\w-]+)", README))))
def test_every_command_of_the_readme_exists(command):
    done = subprocess.run([sys.executable, "-m", "pipeline", command, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_variant_that_the_readme_shows_is_in_the_study():
    (line,) = re.findall(r"^  qk: +\{.*\}$", README, flags=re.MULTILINE)
    assert line in (ROOT / "params.yaml").read_text(encoding="utf-8").splitlines()


def test_the_mistakes_that_the_readme_shows_are_answered_like_that(tmp_path):
    (shown,) = re.findall(r"\$ python -m pipeline validate\n((?:params\.yaml: .*\n)+)", README)
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
