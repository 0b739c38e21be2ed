"""docs/tutorial.md does what it says: every block of it is run, in order, in a fresh copy of this repository.

`sh` blocks are run, each in a shell of its own; `console` blocks, too, and what they answer is what is shown, but for `…` and the
lengths of gaps and rules; `diff` blocks go into `git apply`; other blocks are the file that the line above them names.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from dvc.cli.parser import get_main_parser

from tests.helpers.study import ROOT

PAGE = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"(?:^In `([^`]+)`:\n\n)?^```(\w+)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
TOOLS = Path(sys.executable).parent


def run_page(page, folder):
    """Does what the page says. Raises AssertionError at the first block that fails or answers something else."""
    for path, kind, text in BLOCK.findall(page):
        match kind:
            case "sh":
                answer(text, folder)
            case "console":
                for step in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
                    command, _, shown = step.partition("\n")
                    given = answer(command, folder)
                    assert matches(shown, given), f"$ {command}\n{given}"
            case "diff":
                answer("git apply", folder, text)
            case _:
                assert path, f"no line names the file of\n{text}"
                (folder / path).write_text(text, encoding="utf-8")


def answer(script, folder, given=""):
    """What a script prints, in order, in the environment that the tests run in."""
    changes = {
        "PATH": f"{TOOLS}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(folder),
        "PYTHONUNBUFFERED": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DVC_SITE_CACHE_DIR": str(folder / ".dvc" / "tmp" / "site"),
    }
    env = {name: value for name, value in os.environ.items() if name != "COLUMNS"} | changes
    done = subprocess.run(
        ["bash", "-euc", script],
        cwd=folder, env=env, input=given, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, f"{script}\n{done.stdout}"
    return done.stdout


def matches(shown, given):
    """Whether an answer is as shown: `…` stands for anything in a line, alone in a line for any lines."""
    shown, given = (re.sub(r"([ ─━-])\1+", r"\1", re.sub(r" +$", "", text, flags=re.MULTILINE)) for text in (shown, given))
    lines = ("(?:.*\n)*" if line == "…" else re.escape(line).replace("…", ".*") + "\n" for line in shown.splitlines())
    return re.fullmatch("".join(lines), given) is not None


@pytest.fixture
def clone(tmp_path):
    """What git tracks here, as it is now, in a repository of its own whose environment stands for this one."""
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a checkout of git, so there is nothing to clone")
    for name in filter(None, tracked.stdout.split("\0")):
        if (ROOT / name).is_file():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()
    for stamp in ("study", "test"):
        (tmp_path / ".venv" / stamp).touch()
    answer(
        "git init --quiet; git config user.email reader@example.invalid; git config user.name reader\n"
        "git add --all; git commit --quiet --message Clone",
        tmp_path,
    )
    return tmp_path


def test_the_tutorial_does_what_it_says(clone):
    run_page(PAGE, clone)
    prose = BLOCK.sub("", PAGE)
    spans = set(re.findall(r"`([^`\n]+)`", prose))
    paths = {span for span in spans if re.fullmatch(r"[\w.]+(/[\w.]+)+/?|\w+\.(yaml|md|py)", span)}
    assert len(paths) >= 10
    assert {path for path in paths if not (clone / path).exists()} == set()
    for target in {match[1] for span in spans if (match := re.match(r"make (\w+)", span))}:
        answer(f"make -o .venv/study --dry-run {target}", clone)
    for command in {span for span in spans if span.startswith("dvc ")}:
        get_main_parser().parse_args(command.split()[1:])
    assert answer("git status --porcelain", clone) == ""


@pytest.mark.parametrize(
    ("page", "fault"),
    [
        ("```sh\ntrue\nfalse\ntrue\n```\n", "false"),
        ("```console\n$ echo 1.25 of 4\n1.2… of 5\n```\n", "1.25 of 4"),
        ("```console\n$ printf 'a\\nb\\nc\\n'\na\n…\nb\n```\n", "c"),
        ("```console\n$ echo one\none\n$ echo two\n```\n", "two"),
        ("```diff\n--- a/no.txt\n+++ b/no.txt\n@@ -1 +1 @@\n-a\n+b\n```\n", "no.txt"),
        ("```python\nx = 1\n```\n", "no line names the file"),
    ],
)
def test_a_page_that_is_not_true_is_noticed(page, fault, tmp_path):
    with pytest.raises(AssertionError, match=re.escape(fault)):
        run_page(page, tmp_path)


def test_a_page_that_is_true_passes(tmp_path):
    run_page(
        "In `note.txt`:\n\n```text\nfirst\n1.257\nlast\n```\n\n"
        "```console\n$ cat note.txt\n…\n1.2…\nlast\n$ echo '━━━  ━'\n━━ ━\n```\n```sh\nrm note.txt\n```\n",
        tmp_path,
    )
    assert list(tmp_path.iterdir()) == []
