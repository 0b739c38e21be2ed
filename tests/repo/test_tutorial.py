"""Run every block of docs/tutorial.md, in order, in a fresh copy of this repository.

`sh` blocks run in a shell each. `console` blocks too, and their output must match the page; `…` matches anything, and lengths of
gaps and rules do not count. `diff` blocks go into `git apply`. Any other block is a file, named in the line above it.
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

pytestmark = pytest.mark.xdist_group("tutorial")  # groups start first, so that this long test does not end last
PAGE = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"(?:^In `([^`]+)`:\n\n)?^```(\w+)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
TOOLS = Path(sys.executable).parent


def run_page(page, folder):
    """Run the blocks of `page` in `folder`. Raises AssertionError at the first block that fails or prints something else."""
    for path, kind, text in BLOCK.findall(page):
        match kind:
            case "sh":
                run_script(text, folder)
            case "console":
                for step in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
                    command, _, expected = step.partition("\n")
                    output = run_script(command, folder)
                    assert matches(expected, output), f"$ {command}\n{output}"
            case "diff":
                run_script("git apply", folder, text)
            case _:
                assert path, f"no line names the file of\n{text}"
                (folder / path).write_text(text, encoding="utf-8")


def run_script(script, folder, stdin=""):
    """Return the output of a script, run in the environment of the tests."""
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
        cwd=folder, env=env, input=stdin, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, f"{script}\n{done.stdout}"
    return done.stdout


def matches(expected, output):
    """Whether `output` is as expected. `…` matches anything in a line; a line `…` matches any lines."""
    expected, output = (
        re.sub(r"([ ─━-])\1+", r"\1", re.sub(r" +$", "", text, flags=re.MULTILINE)) for text in (expected, output)
    )
    lines = ("(?:.*\n)*" if line == "…" else re.escape(line).replace("…", ".*") + "\n" for line in expected.splitlines())
    return re.fullmatch("".join(lines), output) is not None


@pytest.fixture
def clone(tmp_path):
    """A git repository with the tracked files of this one as they are now, and the environment of the tests."""
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout, so there is nothing to clone")
    for name in filter(None, tracked.stdout.split("\0")):
        if (ROOT / name).is_file():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()
    for stamp in ("study", "test"):
        (tmp_path / ".venv" / stamp).touch()
    run_script(
        "git init --quiet; git config user.email reader@example.invalid; git config user.name reader\n"
        "git add --all; git commit --quiet --message Clone",
        tmp_path,
    )
    return tmp_path


def test_every_block_of_the_tutorial_runs(clone):
    run_page(PAGE, clone)
    prose = BLOCK.sub("", PAGE)
    spans = set(re.findall(r"`([^`\n]+)`", prose))
    paths = {span for span in spans if re.fullmatch(r"[\w.]+(/[\w.]+)+/?|\w+\.(yaml|md|py)", span)}
    assert len(paths) >= 8
    assert {path for path in paths if not (clone / path).exists()} == set()
    for target in {match[1] for span in spans if (match := re.match(r"make (\w+)", span))}:
        run_script(f"make -o .venv/study --dry-run {target}", clone)
    for command in {span for span in spans if span.startswith("dvc ")}:
        get_main_parser().parse_args(command.split()[1:])
    assert run_script("git status --porcelain", clone) == ""


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
def test_wrong_page_fails(page, fault, tmp_path):
    with pytest.raises(AssertionError, match=re.escape(fault)):
        run_page(page, tmp_path)


def test_correct_page_passes(tmp_path):
    run_page(
        "In `note.txt`:\n\n```text\nfirst\n1.257\nlast\n```\n\n"
        "```console\n$ cat note.txt\n…\n1.2…\nlast\n$ echo '━━━  ━'\n━━ ━\n```\n```sh\nrm note.txt\n```\n",
        tmp_path,
    )
    assert list(tmp_path.iterdir()) == []
